"""The commands without a Trainer, which start in a second."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli

from prl_lightning.report import write_report
from prl_lightning.runs.files import refuse_existing


def export_checkpoint(ckpt_path: str, out: str, dtype: str | None = None) -> None:
    """Write the policy of a checkpoint as a Hugging Face folder.

    Args:
        ckpt_path: a checkpoint of ``prl fit``, one file or a sharded folder.
        out: the folder to create.
        dtype: of the exported weights, such as bfloat16; by default as they were trained.
    """
    from prl_lightning.models import export  # imports torch and transformers

    export.export_checkpoint(ckpt_path, out, dtype)


def copy_configs(folder: Path = Path("configs")) -> None:
    """Copy the package's configurations into a folder.

    Args:
        folder: to create.

    Raises:
        FileExistsError: it exists.
    """
    refuse_existing(folder, "folder")
    shutil.copytree(Path(__file__).parents[1] / "configs", folder)
    print(f"prl fit --config {folder}/arithmetic.yaml")


TOOLS: dict[str, Callable[..., Any]] = {
    "configs": copy_configs,
    "export": export_checkpoint,
    "report": write_report,
}


def run_tool(name: str, words: Sequence[str]) -> None:
    """Run a command.

    Args:
        name: of the command.
        words: its arguments. ``prl report RUN`` is positional, ``prl export --ckpt_path X`` is not.
    """
    auto_cli(TOOLS[name], args=list(words), as_positional=name == "report", prog=f"prl {name}")
