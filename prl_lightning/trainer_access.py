"""What a callback reaches through the Trainer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from prl_lightning.data import PromptDataModule, RolloutBuffer
from prl_lightning.data.loader import gather
from prl_lightning.module import PRLModule


def run_folder(trainer: Trainer) -> Path | None:
    """Where ``metrics.csv`` of this run is, and all else that a run leaves behind."""
    loggers = [logger for logger in trainer.loggers if isinstance(logger, CSVLogger)]
    return Path(loggers[0].log_dir) if loggers else None


def weights_are_of(trainer: Trainer, module: LightningModule) -> dict[str, int]:
    """Step and epoch of the weights: a Trainer that does not train leaves its own at 0."""
    if trainer.state.fn == TrainerFn.FITTING or not trainer.ckpt_path:
        epoch = 0 if trainer.sanity_checking else trainer.current_epoch
        return {"step": trainer.global_step, "epoch": epoch}
    return prl_module(module).loaded_at


def checkpoint_path(trainer: Trainer) -> Path:
    """Where a checkpoint outside the schedule goes: over the last one."""
    callback = trainer.checkpoint_callback
    if not isinstance(callback, ModelCheckpoint) or callback.dirpath is None:
        return Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt"
    return Path(callback.last_model_path or Path(callback.dirpath) / "last.ckpt")


def append_rows(trainer: Trainer, name: str, rows: Sequence[dict[str, Any]]) -> None:
    """Append the rows of all ranks to a JSONL file of the run's folder; a collective.

    Args:
        trainer: its first rank writes, if the run has a folder.
        name: of the file.
        rows: of this rank.
    """
    shares = gather(rows, trainer.global_rank, trainer.world_size)
    folder = run_folder(trainer)
    if shares is not None and folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / name).open("a") as lines:
            lines.writelines(json.dumps(row) + "\n" for share in shares for row in share)


def sum_over_ranks(trainer: Trainer, totals: Tensor) -> Tensor:
    """Totals of all ranks, on every rank."""
    if trainer.world_size == 1:
        return totals
    summed = trainer.strategy.reduce(totals.to(trainer.strategy.root_device), reduce_op="sum")
    return cast(Tensor, summed).cpu()


def is_last_epoch(trainer: Trainer) -> bool:
    """Whether the Trainer's limits leave no epoch after this one, as known at its start."""
    epochs, updates = trainer.max_epochs, trainer.max_steps
    ends = trainer.global_step + trainer.num_training_batches // trainer.accumulate_grad_batches
    by_epochs = epochs is not None and 0 <= epochs <= trainer.current_epoch + 1
    return by_epochs or 0 <= updates <= ends


def prl_module(module: LightningModule) -> PRLModule:
    """The module, or an error that says what is needed."""
    if not isinstance(module, PRLModule):
        raise TypeError(f"the callbacks need a PRLModule, got {type(module).__name__}")
    return module


def train_rollouts(trainer: Trainer) -> RolloutBuffer:
    """The training buffer, there once the data is set up."""
    buffer = prompt_data(trainer).train_rollouts
    if buffer is None:
        raise RuntimeError("data.setup('fit') comes first")
    return buffer


def prompt_data(trainer: Trainer) -> PromptDataModule:
    """The data, or an error that says what is needed."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(data, PromptDataModule):
        raise TypeError(
            "RolloutCallback needs a PromptDataModule: trainer.fit(module, datamodule=...)"
        )
    return data
