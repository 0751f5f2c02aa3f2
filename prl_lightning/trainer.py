"""PRLTrainer: complete checkpoints only, safe loading, and the strategy ``fsdp2``."""

from __future__ import annotations

import os
import shutil
import zipfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from torch.distributed.constants import default_pg_timeout

from prl_lightning.checks.lightning_options import refuse_hardware, refuse_unstartable
from prl_lightning.models.mesh import hybrid_mesh
from prl_lightning.runs.folders import claim_folders, keep_metrics
from prl_lightning.runs.unpickling import refuse_code
from prl_lightning.runs.warnings import hide_irrelevant_warnings

OFFLOADING_BACKEND = "cpu:gloo,cuda:nccl"
OUT_OF_MEMORY = (
    "Raise trainer.accumulate_grad_batches (fewer completions in a micro-batch), set "
    "model.gradient_checkpointing=true, lower rollout.max_new_tokens, or give the engine less. "
    "`prl check` estimates each part; docs/strategies.md has more."
)


class FSDP2Strategy(ModelParallelStrategy):
    """FSDP2 over all ranks of the Trainer, by the name ``fsdp2``.

    Lightning's ModelParallelStrategy needs the number of ranks again, as ``data_parallel_size``,
    and by default uses the ranks of a node for tensor parallelism.

    Args:
        save_distributed_checkpoint: every rank writes its shard into a folder; otherwise rank 0
            writes one file.
        process_group_backend: by default NCCL for GPUs and Gloo for CPUs.
        timeout: of a collective.
        replicas: number of copies of the model; neighbouring ranks shard a copy. With one copy per
            machine, weights are gathered within a machine, and only the sum of the gradients
            crosses the network (hybrid sharding, HSDP).
        cpu_offload: keep the shards of weights and gradients and the optimizer's states in main
            memory, and step the optimizer there. A device then holds one gathered block at a time.
    """

    def __init__(
        self,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
        replicas: int = 1,
        cpu_offload: bool = False,
    ) -> None:
        super().__init__("auto", 1, save_distributed_checkpoint, process_group_backend, timeout)
        self.replicas = replicas
        self.cpu_offload = cpu_offload

    def setup_environment(self) -> None:
        """Use every rank for data parallelism."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        if self.cpu_offload and self.root_device.type == "cuda":
            # NCCL has no sums of tensors in main memory, which the norm of the gradient is.
            self._process_group_backend = self._process_group_backend or OFFLOADING_BACKEND
        super().setup_environment()
        if self.replicas > 1:
            self._device_mesh = hybrid_mesh(self.root_device.type, self.replicas, self.world_size)
            assert self.lightning_module is not None
            self.lightning_module._device_mesh = self._device_mesh

    def model_to_device(self) -> None:
        """Leave offloaded shards where they are."""
        if not self.cpu_offload:
            super().model_to_device()


class CheckpointFile(TorchCheckpointIO):
    """Lightning's files, loaded to the CPU by its name.

    Lightning passes a function, which torch refuses for tensor subclasses. With torchao's 8-bit
    optimizers, whose states are such, a run could be saved but not resumed.
    """

    def load_checkpoint(
        self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """See Lightning's TorchCheckpointIO."""
        return super().load_checkpoint(path, map_location, weights_only)


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="FSDP2 over all ranks")


class PRLTrainer(Trainer):
    """Lightning's Trainer, with checkpoints that are renamed into place when complete.

    Loading a checkpoint runs no code from it, unless ``weights_only=False`` is set.

    Args:
        num_sanity_val_steps: by default, all: the initial policy is evaluated.
        log_every_n_steps: by default 1, since an iteration may have a single update.
        use_distributed_sampler: off, because each rank reads the buffer that it has filled.
        enable_model_summary: off: it counts no FLOPs of a language model, and frozen parts as in
            eval mode. ``prl check`` has the sizes.
        kwargs: all other arguments of Lightning's Trainer.
    """

    def __init__(
        self,
        *,
        num_sanity_val_steps: int | None = -1,
        log_every_n_steps: int | None = 1,
        use_distributed_sampler: bool = False,
        enable_model_summary: bool | None = False,
        **kwargs: Any,
    ) -> None:
        hide_irrelevant_warnings()
        refuse_hardware(kwargs.get("accelerator"), kwargs.get("strategy"))
        super().__init__(
            num_sanity_val_steps=num_sanity_val_steps,
            log_every_n_steps=log_every_n_steps,
            use_distributed_sampler=use_distributed_sampler,
            enable_model_summary=enable_model_summary,
            **kwargs,
        )
        refuse_unstartable(self)
        if type(self.strategy.checkpoint_io) is TorchCheckpointIO:  # not a user's plugin
            self.strategy.checkpoint_io = CheckpointFile()
        # The Timer of max_time first: the other callbacks see that the run ends, and finish it.
        callbacks = self.callbacks  # type: ignore[attr-defined]
        callbacks.sort(key=lambda callback: not isinstance(callback, Timer))

    def _run(
        self,
        model: LightningModule,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
    ) -> Any:
        """Run fit, validate, test or predict, and load checkpoints with ``weights_only``.

        Lightning treats None as False for a checkpoint at a URL. The loggers' folders are prepared
        here, because Lightning opens them before it calls the first hook.
        """
        if weights_only is None:
            weights_only = True
        if weights_only and ckpt_path is not None:
            refuse_code(Path(ckpt_path))
        if self.is_global_zero:
            claim_folders(self.loggers)
            is_new = self.state.fn == TrainerFn.FITTING and ckpt_path is None
            keep_metrics(self.loggers, is_new)
        try:
            return super()._run(model, ckpt_path=ckpt_path, weights_only=weights_only)
        except torch.OutOfMemoryError as error:
            error.add_note(OUT_OF_MEMORY)
            raise

    def save_checkpoint(
        self,
        filepath: str | Path,
        weights_only: bool | None = None,
        storage_options: Any | None = None,
    ) -> None:
        """Save a file, or with a sharding strategy a folder; all ranks call this.

        Args:
            filepath: an existing checkpoint is kept until the new one is complete.
            weights_only: leave out everything that only a resumed run needs.
            storage_options: for the CheckpointIO plugin.
        """
        if "://" in str(filepath):  # object stores show only complete files
            super().save_checkpoint(filepath, bool(weights_only), storage_options)
            return
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
    """Find the newest complete ``last*.ckpt`` among the runs of this root folder.

    If there is none, find the newest checkpoint of any name. A metric such as ``val/set/mean@8`` in
    the file name makes folders, which are searched too.

    Args:
        trainer: its root folder, loggers and checkpoint callbacks are searched.
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
    names = {path: path.relative_to(at) for at in folders for path in at.rglob("[!.]*.ckpt")}
    found = [
        path  # incomplete ones start with a dot; a folder in a folder is of another run
        for path, name in names.items()
        if "checkpoints" not in name.parts and _is_complete(path)
    ]
    last = [path for path in found if str(names[path]).startswith("last")]
    return max(last or found, key=_written_at, default=None)


def _is_complete(checkpoint: Path) -> bool:
    """Check for the end of a file, and for the files that are written last into a folder."""
    if checkpoint.is_dir():
        return (checkpoint / ".metadata").is_file() and (checkpoint / "meta.pt").is_file()
    return zipfile.is_zipfile(checkpoint)


def _written_at(checkpoint: Path) -> int:
    return (checkpoint / "meta.pt" if checkpoint.is_dir() else checkpoint).stat().st_mtime_ns


def _to_disk(path: Path) -> None:
    """Flush to disk before the old checkpoint is removed: a lost machine loses its page cache."""
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())


def _put_in_place(part: Path, final: Path) -> None:
    """Rename. A folder cannot replace another, so the old one is renamed first.

    ``last_checkpoint`` finds it under that name, too.
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
