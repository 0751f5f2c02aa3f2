"""Options of Lightning that would change an update, average or upload nothing, without a word."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from prl_lightning.data import PromptDataModule
from prl_lightning.evaluation import Evaluation
from prl_lightning.models.sharding import is_sharding

# Callbacks that cannot work here, with the reason and the fix.
UNUSABLE: dict[type[Callback], str] = {
    GradientAccumulationScheduler: "which changes the number of micro-batches of an update, but an "
    "update is all rollouts of its prompts. Leave it out, and set data.updates_per_epoch for the "
    "number of updates",
    BatchSizeFinder: "which tries batches of other sizes, but a batch is a part of the rollouts. "
    "Leave it out, and set trainer.accumulate_grad_batches for smaller micro-batches",
    LearningRateFinder: "which trains on batches that are not sampled yet. Leave it out, and set "
    "model.optimizer",
    StochasticWeightAveraging: "which copies the model before it is loaded and would average "
    "nothing. Use WeightAveraging or EMAWeightAveraging",
}
METRIC = re.compile(r"val/.+/(mean|pass|maj)@\d+")  # of an evaluation set
# Parts of the names of strategies and accelerators, with the reason and the fix.
UNSUPPORTED = {
    "deepspeed": "DeepSpeed keeps weights and gradients in partitions of its own, which the engine "
    "and the update guard do not read. Use ddp, fsdp or fsdp2",
    "xla": "no engine here samples on XLA devices. Use a GPU or a CPU",
    "tpu": "no engine here samples on TPUs. Use a GPU or a CPU",
}


def lightning_errors(trainer: Trainer, data: PromptDataModule) -> Iterator[str]:
    """Find options of the Trainer, its callbacks and loggers that cannot work in a training.

    Args:
        trainer: not started.
        data: sizes of an epoch.

    Yields:
        One message per error.
    """
    batches = data.updates_per_epoch * trainer.accumulate_grad_batches
    limit = trainer.limit_train_batches
    is_whole = limit >= batches if isinstance(limit, int) else limit == 1.0
    if not is_whole and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        by_overfit = trainer.overfit_batches > 0  # type: ignore[attr-defined]
        yield (
            f"trainer.{'overfit_batches' if by_overfit else 'limit_train_batches'}={limit} would "
            f"cut the updates of an epoch, which need all of its {batches} micro-batches. Leave it "
            "out, and lower data.prompts_per_epoch for shorter epochs."
        )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        for kind, why in UNUSABLE.items():
            if isinstance(callback, kind):
                yield f"trainer.callbacks has {type(callback).__name__}, {why}."
        if isinstance(callback, WeightAveraging) and is_sharding(trainer.strategy):
            yield (
                f"trainer.callbacks has {type(callback).__name__}, which cannot copy a model that "
                f"trainer.strategy={type(trainer.strategy).__name__} shards. Use `strategy: ddp`, "
                "or leave the callback out."
            )
    yield from _of_monitors(trainer, data.evaluation)
    yield from _of_uploads(trainer)


def _of_monitors(trainer: Trainer, evaluation: Evaluation) -> Iterator[str]:
    """A misspelled metric would end the run after its first iteration and evaluation."""
    known = [f"val/{name}/{metric}" for name in evaluation.sets for metric in evaluation.metrics]
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        monitor = getattr(callback, "monitor", None) or ""
        if METRIC.fullmatch(monitor) and monitor not in known:
            yield (
                f"trainer.callbacks has {type(callback).__name__}(monitor={monitor!r}), but the "
                f"evaluation logs {known}. Use one of these, or change evaluation."
            )


def _of_uploads(trainer: Trainer) -> Iterator[str]:
    strategy = trainer.strategy
    is_folder = getattr(strategy, "_save_distributed_checkpoint", False)
    is_folder |= getattr(strategy, "_state_dict_type", "full") == "sharded"
    several = [
        type(callback).__name__
        for callback in trainer.checkpoint_callbacks
        if getattr(callback, "save_top_k", 0) != -1
    ]
    for logger in trainer.loggers:
        log_model = getattr(logger, "_log_model", False)
        name = f"trainer.logger has {type(logger).__name__}(log_model={log_model!r})"
        if log_model and is_folder:
            yield (
                f"{name}, which uploads files, but trainer.strategy={type(strategy).__name__} "
                "saves checkpoints as folders. Leave log_model out, or let the strategy save files "
                "(save_distributed_checkpoint: false, state_dict_type: full)."
            )
        # Those that remember one callback until the end.
        if log_model is True and hasattr(logger, "_checkpoint_callback") and len(several) > 1:
            yield (
                f"{name}, which uploads the checkpoints of one callback, but trainer.callbacks has "
                f"{', '.join(several)}. Leave all but one out, or set log_model to 'all'."
            )


def refuse_hardware(accelerator: Any, strategy: Any) -> None:
    """Refuse what Lightning has and this package cannot serve, before Lightning asks to install it.

    Args:
        accelerator: of the Trainer, a name or an object.
        strategy: likewise.

    Raises:
        ValueError: it cannot work here.
    """
    for option, value in (("accelerator", accelerator), ("strategy", strategy)):
        name = value if isinstance(value, str) else type(value).__name__
        for part, why in UNSUPPORTED.items():
            if part in name.lower():
                raise ValueError(f"trainer.{option}={name!r}: {why}.")
    has_gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    if accelerator in ("gpu", "cuda") and not has_gpu:
        raise ValueError(
            f"trainer.accelerator={accelerator!r}, but torch {torch.__version__} sees no GPU. Use "
            "auto or cpu, or install a build of torch for this GPU and its driver (`nvidia-smi`)."
        )


def refuse_unstartable(trainer: Trainer) -> None:
    """Refuse several devices for a program that Lightning cannot start again, once per device.

    Args:
        trainer: not started. Ranks that torchrun or SLURM has started are no second start.

    Raises:
        ValueError: the program is no file but text, from stdin or of ``python -c``.
    """
    launcher = trainer.strategy.launcher
    if not isinstance(launcher, _SubprocessScriptLauncher) or launcher.num_processes == 1:
        return
    is_text = sys.modules["__main__"].__spec__ is None and not Path(sys.argv[0]).is_file()
    if is_text and not launcher.cluster_environment.creates_processes_externally:
        raise ValueError(
            f"trainer.devices={launcher.num_processes}, but this program is no file (it is from "
            "stdin or `python -c`), so Lightning cannot start it once per device. Save it to a "
            "file, or set trainer.strategy='ddp_notebook'."
        )


def strategy_errors(trainer: Trainer) -> Iterator[str]:
    """Find ranks that cannot be divided as a strategy is told to.

    Args:
        trainer: not started.

    Yields:
        One message per error.
    """
    strategy = trainer.strategy
    replicas = getattr(strategy, "replicas", 1)
    if replicas < 1 or trainer.world_size % replicas:
        yield (
            f"trainer.strategy.replicas={replicas}, but the trainer has {trainer.world_size} ranks "
            "(trainer.devices x num_nodes). Use a divisor of them, such as num_nodes."
        )
    size = getattr(strategy, "_tensor_parallel_size", 1)
    if (trainer.num_devices if size == "auto" else size) > 1:
        yield (
            f"trainer.strategy.tensor_parallel_size={size}: models are sharded over data-parallel "
            "ranks only. Use `strategy: fsdp2`."
        )
