"""PRLTrainer: a checkpoint is there whole or not at all, and the last one can be found."""

from __future__ import annotations

import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from prl_lightning.runs.unpickling import refuse_code
from prl_lightning.strategies import FSDP2Strategy  # noqa: F401  (known by its name from here on)


class PRLTrainer(Trainer):
    """Lightning's Trainer, whose checkpoints are written beside and renamed when complete.

    Nothing in a checkpoint is run, unless ``weights_only=False`` asks for it.

    Args:
        num_sanity_val_steps: Lightning's; by default the starting policy is evaluated on all.
        log_every_n_steps: Lightning's; by default an iteration of one update is logged as well.
        use_distributed_sampler: Lightning's; off, for a rank reads the buffer that it has filled.
        kwargs: everything else of Lightning's Trainer.
    """

    def __init__(
        self,
        *,
        num_sanity_val_steps: int | None = -1,
        log_every_n_steps: int | None = 1,
        use_distributed_sampler: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            num_sanity_val_steps=num_sanity_val_steps,
            log_every_n_steps=log_every_n_steps,
            use_distributed_sampler=use_distributed_sampler,
            **kwargs,
        )

    def _run(
        self,
        model: LightningModule,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
    ) -> Any:
        """Where fit, validate, test and predict come together, the checkpoint's name found.

        Lightning takes None for False where a checkpoint is not on this machine.
        """
        if weights_only is None:
            weights_only = True
        if weights_only and ckpt_path is not None:
            refuse_code(Path(ckpt_path))
        return super()._run(model, ckpt_path=ckpt_path, weights_only=weights_only)

    def save_checkpoint(
        self,
        filepath: str | Path,
        weights_only: bool | None = None,
        storage_options: Any | None = None,
    ) -> None:
        """Save a file, or with a sharding strategy a folder; all ranks call this.

        Args:
            filepath: its name; what has that name is kept until the new one is complete.
            weights_only: leave out what only a continued run needs.
            storage_options: for the CheckpointIO plugin.

        Raises:
            ValueError: a plugin writes in the background, so that nobody knows when it is complete.
        """
        if "://" in str(filepath):  # an object store shows what is complete and nothing else
            super().save_checkpoint(filepath, bool(weights_only), storage_options)
            return
        if isinstance(self.strategy.checkpoint_io, AsyncCheckpointIO):
            raise ValueError(
                "trainer.plugins has AsyncCheckpointIO, which returns before the checkpoint is "
                "complete. Leave it out."
            )
        final = Path(filepath)
        part = final.with_name(f".part-{final.name}")
        if self.is_global_zero:
            _remove(part)
        self.strategy.barrier("PRLTrainer.save_checkpoint: begin")
        try:
            super().save_checkpoint(part, bool(weights_only), storage_options)
            if self.is_global_zero:
                _to_disk(part)
                _put_in_place(part, final)
        except BaseException:
            if self.is_global_zero:
                _remove(part)
            raise
        self.strategy.barrier("PRLTrainer.save_checkpoint: end")


def last_checkpoint(trainer: Trainer) -> Path | None:
    """The newest complete ``last*.ckpt`` of the runs that this one would lie beside.

    Where there is none at all the newest of any name, as Lightning writes it by itself.

    Args:
        trainer: knows the folders of its root, its loggers and its checkpoint callbacks.
    """
    root = Path(trainer.default_root_dir)
    roots = {root} | {
        Path(logger.save_dir) / str(logger.name) for logger in trainer.loggers if logger.save_dir
    }
    folders = {root / "checkpoints"} | {
        folder for some in roots for folder in some.glob("*/checkpoints")
    }
    folders |= {
        Path(callback.dirpath)
        for callback in trainer.checkpoint_callbacks
        if isinstance(callback, ModelCheckpoint) and callback.dirpath
    }
    for pattern in ("last*.ckpt", "[!.]*.ckpt"):  # half a checkpoint's name begins with a dot
        found = [path for folder in folders for path in folder.glob(pattern) if _is_complete(path)]
        if found:
            return max(found, key=_written_at)
    return None


def _is_complete(checkpoint: Path) -> bool:
    """A file that ends as it should; a folder with what is written into it at the end."""
    if checkpoint.is_dir():
        return (checkpoint / ".metadata").is_file() and (checkpoint / "meta.pt").is_file()
    return zipfile.is_zipfile(checkpoint)


def _written_at(checkpoint: Path) -> int:
    return (checkpoint / "meta.pt" if checkpoint.is_dir() else checkpoint).stat().st_mtime_ns


def _to_disk(path: Path) -> None:
    """Have it on the disk before the old one goes: a machine that is taken away loses its cache."""
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())


def _put_in_place(part: Path, final: Path) -> None:
    """Rename; a folder cannot replace another, so the old one steps aside under a name of its own.

    The name is one that ``last_checkpoint`` finds as well.
    """
    if part.is_file() and not final.is_dir():
        part.replace(final)
        return
    aside = final.with_name(f"{final.stem}-previous{final.suffix}")
    if final.exists():
        _remove(aside)
        final.rename(aside)
    part.rename(final)
    _remove(aside)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
