"""UpdateGuard: skip optimizer steps whose gradient is NaN or infinite."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from prl_lightning.models.sharding import full
from prl_lightning.runs.text import prompt_text
from prl_lightning.trainer_access import (
    append_rows,
    prl_module,
    prompt_data,
    save_now,
)

SKIPPED = "skipped_updates.jsonl"


class UpdateGuard(Callback):
    """Skip optimizer steps whose gradient is NaN or infinite, on all ranks together.

    ``train/skipped_updates`` counts them. ``skipped_updates.jsonl`` in the run's folder has the
    prompts and rewards of the micro-batches whose loss was not finite, or of all micro-batches if
    the loss was finite on all ranks. With a gradient scaler (16-mixed) the scaler skips steps, and
    an overflow of its scale is normal: there only the loss is checked.

    Args:
        max_skipped: stop after more than this many skipped updates in a row, with a checkpoint of
            the weights before them.

    Raises:
        ValueError: the number is negative.
    """

    def __init__(self, max_skipped: int = 4) -> None:
        if max_skipped < 0:
            raise ValueError(f"guard.max_skipped={max_skipped}: must be at least 0.")
        self.max_skipped = max_skipped
        self._in_a_row = 0
        self._losses: list[Tensor] = []

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Keep the loss without reading it, which would wait for the device."""
        self._losses.append(loss.detach())

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Remove a non-finite gradient: optimizers skip parameters without one."""
        losses, self._losses = self._losses, []
        module = prl_module(pl_module)
        if module.scales_gradient:
            is_finite = bool(torch.stack(losses).isfinite().all())
        else:
            is_finite = bool(full(module.gradient_norm()).isfinite())
        is_usable = trainer.strategy.reduce_boolean_decision(is_finite, all=True)
        # Equal on every rank.
        pl_module.log("train/skipped_updates", float(not is_usable), on_step=False, on_epoch=True,
                      reduce_fx="sum")  # fmt: skip
        self._in_a_row = 0 if is_usable else self._in_a_row + 1
        if not is_usable:
            if not module.scales_gradient:
                optimizer.zero_grad(set_to_none=True)
            self._write(trainer, losses)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop if updates are skipped again and again.

        Raises:
            RuntimeError: more than ``max_skipped`` in a row.
        """
        if self._in_a_row <= self.max_skipped:
            return
        saved = save_now(trainer)
        raise RuntimeError(
            f"{self._in_a_row} updates in a row were skipped because their gradient is NaN or "
            f"infinite; guard.max_skipped={self.max_skipped} are allowed. The weights before them: "
            f"{saved}. The prompts are in {SKIPPED} in the run's folder. Lower the learning rate, "
            "or raise the precision."
        )

    def _write(self, trainer: Trainer, losses: list[Tensor]) -> None:
        buffer = prompt_data(trainer).train_buffer
        micro_batches = buffer.micro_batch_rollouts[buffer.position - len(losses) : buffer.position]
        finite = torch.stack(losses).isfinite().tolist()
        # Over all ranks: if one has a bad loss, the prompts of the others are not suspects.
        all_finite = trainer.strategy.reduce_boolean_decision(all(finite), all=True)
        suspects = [
            {"prompt": prompt_text(rollout.prompt.source), "reward": rollout.reward}
            for rollouts, is_finite in zip(micro_batches, finite, strict=True)
            for rollout in rollouts
            if not is_finite or all_finite
        ]
        rank_zero_warn(f"Update {trainer.global_step} is skipped: its gradient is not finite.")
        row = {"step": trainer.global_step, "rank": trainer.global_rank, "completions": suspects}
        append_rows(trainer, SKIPPED, [row])
