"""The package's modules import each other without circles, and no more than they need."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "prl_lightning"
FILES = sorted(PACKAGE.rglob("*.py"))


def module_name(file: Path) -> str:
    parts = (PACKAGE.name, *file.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts).removesuffix(".__init__")


def imported_names(file: Path) -> set[str]:
    """Full names of modules and imported names, also in functions and for types alone."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
            names.add(str(node.module))
    return names


def test_no_circles() -> None:
    modules = {module_name(file) for file in FILES}
    graph = {module_name(file): imported_names(file) & modules for file in FILES}
    assert "prl_lightning.types" in graph["prl_lightning.rollouts.collector"]
    TopologicalSorter(graph).prepare()  # raises a CycleError that names the circle


def test_benchmarks_import_what_exists() -> None:
    """They are not run here, and would rot when a name changes."""
    files = sorted((PACKAGE.parent / "benchmarks").rglob("*.py"))
    assert len(files) > 10
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith(PACKAGE.name):
                module = importlib.import_module(str(node.module))
                missing = [a.name for a in node.names if not hasattr(module, a.name)]
                assert not missing, f"{file.name}: {node.module} has no {missing}"


def test_the_root_is_small() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 9


def test_few_files_import_vllm() -> None:
    importing = [
        file for file in FILES if any(name.split(".")[0] == "vllm" for name in imported_names(file))
    ]
    names = ("nccl_transfer.py", "vllm.py", "vllm_internals.py")
    assert importing == [PACKAGE / "sampling" / name for name in names]


def test_callbacks_are_imported_by_the_command_line_alone() -> None:
    importing = {
        module_name(file).split(".")[1]
        for file in FILES
        if any(name.startswith("prl_lightning.callbacks") for name in imported_names(file))
    }
    assert importing == {"callbacks", "cli"}


@pytest.mark.process
@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("prl_lightning.functional", ("lightning", "transformers", "torchmetrics", "vllm")),
        ("prl_lightning.types", ("lightning", "transformers", "torchmetrics", "vllm")),
        # Every rank starts a process that loads no more than this.
        ("prl_lightning.rewards", ("torch", "lightning", "transformers", "vllm")),
        # The engine is imported when it starts: the package works without it.
        ("prl_lightning.cli.lightning", ("vllm", "reasoning_gym")),
        # Commands that people use often start in a second.
        ("prl_lightning.cli.tools", ("torch", "lightning", "transformers")),
        ("prl_lightning.cli", ("torch", "lightning", "transformers", "jsonargparse")),
    ],
)
def test_import_pulls_in_no_more_than_it_needs(module: str, absent: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print([name for name in {absent} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
