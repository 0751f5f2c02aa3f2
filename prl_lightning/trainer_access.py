"""Reach the parts of a run from a callback, through the Trainer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.trainer.states import TrainerFn

from prl_lightning.data import PromptDataModule
from prl_lightning.distributed import gather
from prl_lightning.module import PRLModule


def csv_logger(trainer: Trainer) -> CSVLogger | None:
    """Return the logger that writes ``metrics.csv``, or None."""
    return next((logger for logger in trainer.loggers if isinstance(logger, CSVLogger)), None)


def run_folder(trainer: Trainer) -> Path:
    """Return the folder of everything that a run writes.

    That is the folder of its CSVLogger, or of the first logger with a folder, or else
    ``trainer.default_root_dir``.
    """
    for logger in (csv_logger(trainer), *trainer.loggers):
        if logger is not None and (folder := getattr(logger, "log_dir", None)):
            return Path(folder)
    return Path(trainer.default_root_dir)


def weights_origin(trainer: Trainer, module: LightningModule) -> dict[str, int]:
    """Return step and epoch of the weights; outside of fit, those of the loaded checkpoint."""
    if trainer.state.fn == TrainerFn.FITTING or not trainer.ckpt_path:
        epoch = 0 if trainer.sanity_checking else trainer.current_epoch
        return {"step": trainer.global_step, "epoch": epoch}
    return prl_module(module).loaded_at


def save_now(trainer: Trainer) -> str:
    """Save an unscheduled checkpoint, which replaces the last one; a collective.

    Returns:
        What was done: "saved" and the path. A ``fast_dev_run`` saves nothing.
    """
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return "saved nothing (trainer.fast_dev_run)"
    path = checkpoint_path(trainer)
    trainer.save_checkpoint(path)
    return f"saved {path}"


def checkpoint_path(trainer: Trainer) -> Path:
    """Return where an unscheduled checkpoint goes; it replaces the last one."""
    callback = trainer.checkpoint_callback
    if isinstance(callback, ModelCheckpoint) and callback.dirpath is not None:
        return Path(callback.last_model_path or Path(callback.dirpath) / "last.ckpt")
    return Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt"


def append_rows(trainer: Trainer, name: str, rows: Sequence[dict[str, Any]]) -> None:
    """Append the rows of all ranks to a JSON-lines file in the run's folder; a collective.

    Args:
        trainer: its first rank writes.
        name: of the file.
        rows: of this rank.
    """
    shares = gather(rows)
    if shares is not None:
        folder = run_folder(trainer)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / name).open("a") as lines:
            lines.writelines(json.dumps(row) + "\n" for share in shares for row in share)


def is_last_epoch(trainer: Trainer) -> bool:
    """Whether this is the last epoch by max_epochs and max_steps; max_time is not considered."""
    return not has_epoch(trainer, ahead=1)


def has_epoch(trainer: Trainer, ahead: int) -> bool:
    """Whether there is an epoch so many after this one, by max_epochs and max_steps."""
    epochs, updates = trainer.max_epochs, trainer.max_steps
    per_epoch = trainer.num_training_batches // trainer.accumulate_grad_batches
    begins = trainer.global_step + ahead * per_epoch
    by_epochs = epochs is None or epochs < 0 or trainer.current_epoch + ahead < epochs
    return by_epochs and (updates < 0 or begins < updates)


def count_skipped(trainer: Trainer) -> None:
    """Count a batch of None, which Lightning skips, as started.

    Otherwise a checkpoint's counters would differ, and Lightning would not see where it was saved.

    Args:
        trainer: in ``on_train_batch_end`` of that batch.
    """
    trainer.fit_loop.epoch_loop.batch_progress.increment_started()


def finish_iteration(trainer: Trainer) -> None:
    """Let a run that stops early make the iteration's last update, and evaluate it.

    Lightning would stop after any micro-batch, and evaluate only at ``check_val_every_n_epoch``.

    Args:
        trainer: to be stopped, in ``on_train_batch_end``; call it again until the last batch.
    """
    trainer.should_stop = trainer.is_last_batch
    if trainer.is_last_batch:
        trainer.check_val_every_n_epoch = 1


def prl_module(module: LightningModule) -> PRLModule:
    """Return the module as a PRLModule.

    Raises:
        TypeError: it is another module.
    """
    if not isinstance(module, PRLModule):
        raise TypeError(f"the callbacks need a PRLModule, got {type(module).__name__}")
    return module


def prompt_data(trainer: Trainer) -> PromptDataModule:
    """Return the data of a run.

    Raises:
        TypeError: it is not a PromptDataModule.
    """
    data = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(data, PromptDataModule):
        raise TypeError(
            "RolloutCallback needs a PromptDataModule: trainer.fit(module, datamodule=...)"
        )
    return data
