"""Imports run downward only (functional and types at the bottom, the command line on top)."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "prl_lightning"

# A part may import the parts below it, never one beside or above it. arithmetic stands beside all.
LAYERS = [
    {"packing"},
    {
        "types",
        "functional",
        "run_files",
        "sharding",
        "strategies",
        "tables",
        "terminal",
        "unpickling",
    },
    {"adapters", "experts", "onednn", "packed_attention"},
    {"metrics", "step_splitter", "rewards", "samplers", "models", "arithmetic"},
    {"evaluation", "objective", "data", "export"},
    {"module"},
    {"callbacks"},
    {"check", "configuration", "report", "trainer"},
    {"cli"},
    {"__main__"},
]
RANK = {part: rank for rank, parts in enumerate(LAYERS) for part in parts}


def part_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(file: Path) -> set[str]:
    """Full names, of ``from . import x`` and ``from prl_lightning import x`` as well."""
    package = ("prl_lightning", *file.relative_to(PACKAGE).parts[:-1])
    modules: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            modules |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return modules


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("from prl_lightning import cli", "prl_lightning.cli"),
        ("from . import guard", "prl_lightning.callbacks.update_guard"),
        ("from .. import cli", "prl_lightning.cli"),
        ("from ..cli import main", "prl_lightning.cli"),
        ("import prl_lightning.cli as c", "prl_lightning.cli"),
    ],
)
def test_every_form_of_an_import_is_seen(
    line: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{__name__}.PACKAGE", tmp_path)
    file = tmp_path / "callbacks" / "some.py"
    file.parent.mkdir()
    file.write_text(line)
    assert found in imported_modules(file)


FILES = sorted(file for file in PACKAGE.rglob("*.py") if file != PACKAGE / "__init__.py")


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_run_downward(file: Path) -> None:
    own = part_of(file)
    for module in imported_modules(file):
        if module.startswith("prl_lightning."):
            other = module.split(".")[1]
            if other != own and other in RANK:  # or it is a name of the package itself
                assert RANK[other] < RANK[own], f"{own} imports {other}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_only_one_file_imports_vllm(file: Path) -> None:
    if file != PACKAGE / "samplers" / "vllm.py":
        assert "vllm" not in {module.split(".")[0] for module in imported_modules(file)}


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("prl_lightning.functional", ("lightning", "transformers", "torchmetrics", "vllm")),
        ("prl_lightning.types", ("lightning", "transformers", "torchmetrics", "vllm")),
        # Every rank starts a process of its own that loads no more than this.
        ("prl_lightning.rewards", ("torch", "lightning", "transformers", "vllm")),
        # The engine is imported when it starts: the package works without it.
        ("prl_lightning.cli", ("vllm",)),
    ],
)
def test_import_pulls_in_no_more_than_it_needs(module: str, absent: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print([name for name in {absent} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/"
    )
    assert done.stdout.strip() == "[]"
