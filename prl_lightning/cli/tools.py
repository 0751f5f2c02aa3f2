"""The commands without a Trainer, which start in a second."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli

from prl_lightning.report import write_report
from prl_lightning.runs.files import refuse_existing

CONFIGS = Path(__file__).parents[1] / "configs"
_COMPILED = shutil.ignore_patterns("__pycache__")
# What `prl new` replaces in configs/own.yaml: rewards, and sizes for ten problems.
REPLACED = {
    "configs/own.yaml": "own.yaml",
    "  rewards: [prl_lightning.rewards.MathReward]  # looks at the box alone\n": "  rewards: "
    "[prl_lightning.rewards.MathReward, my_rewards.short_enough]\n"
    "  reward_weights: [1.0, 0.1]                  # a completion is right from a sum of 0.5 on\n",
    "prompts_per_epoch: 64": "prompts_per_epoch: 8                        # of ten; 64 with more",
    "accumulate_grad_batches: 64": "accumulate_grad_batches: 8 ",
    "of 64 prompts x": "of 8 prompts x",
}


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
    shutil.copytree(CONFIGS, folder)
    print(f"prl fit --config {folder}/arithmetic.yaml")


def new_project(folder: Path) -> None:
    """Create a folder with a configuration, a reward function and ten problems to replace.

    Args:
        folder: to create.

    Raises:
        FileExistsError: it exists.
    """
    refuse_existing(folder, "folder")
    config = (CONFIGS / "own.yaml").read_text()
    for old, new in REPLACED.items():
        config = config.replace(old, new)
    shutil.copytree(Path(__file__).with_name("project"), folder, ignore=_COMPILED)
    (folder / "own.yaml").write_text(config)
    print(f"cd {folder}; prl check --config own.yaml; prl fit --config own.yaml")


TOOLS: dict[str, Callable[..., Any]] = {
    "configs": copy_configs,
    "export": export_checkpoint,
    "new": new_project,
    "report": write_report,
}


def run_tool(name: str, words: Sequence[str]) -> None:
    """Run a command.

    Args:
        name: of the command.
        words: its arguments. ``prl report RUN`` is positional, ``prl export --ckpt_path X`` is not.
    """
    positional = name in ("new", "report")
    auto_cli(TOOLS[name], args=list(words), as_positional=positional, prog=f"prl {name}")
