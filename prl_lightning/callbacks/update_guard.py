"""UpdateGuard: what is no number never reaches the weights."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from prl_lightning.callbacks.completion_log import prompt_text
from prl_lightning.models.sharding import full
from prl_lightning.trainer_access import (
    append_rows,
    checkpoint_path,
    prl_module,
    train_rollouts,
)

SKIPPED = "skipped_updates.jsonl"


class UpdateGuard(Callback):
    """Skip an update whose gradient is NaN or infinite, on all ranks together.

    ``train/skipped_updates`` counts them, and ``skipped_updates.jsonl`` of the run's folder has the
    prompts and rewards of the micro-batches whose loss was not finite (of all of the update's where
    every loss of every rank was). With a gradient scaler (16-mixed) the scaler does the skipping,
    and a gradient too large for the scale is its own affair: there it is the loss that counts.

    Args:
        max_skipped: after more than so many skipped updates in a row the run stops, with a
            checkpoint of the weights before them.

    Raises:
        ValueError: the number is negative.
    """

    def __init__(self, max_skipped: int = 4) -> None:
        if max_skipped < 0:
            raise ValueError(f"guard.max_skipped={max_skipped}: must not be negative.")
        self.max_skipped = max_skipped
        self._in_a_row = 0
        self._losses: list[Tensor] = []

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Keep the loss, to look at if it comes to that: reading it would wait for the device."""
        self._losses.append(loss.detach())

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Take an unusable gradient away: an optimizer leaves parameters without one alone."""
        losses, self._losses = self._losses, []
        is_scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        if is_scaled:
            is_finite = bool(torch.stack(losses).isfinite().all())
        else:
            is_finite = bool(full(prl_module(pl_module).gradient_norm()).isfinite())
        is_usable = trainer.strategy.reduce_boolean_decision(is_finite, all=True)
        # Every rank has the same count.
        pl_module.log("train/skipped_updates", float(not is_usable), on_step=False, on_epoch=True,
                      reduce_fx="sum")  # fmt: skip
        self._in_a_row = 0 if is_usable else self._in_a_row + 1
        if not is_usable:
            if not is_scaled:
                optimizer.zero_grad(set_to_none=True)
            self._note(trainer, losses)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop where nothing but skipping goes on.

        Raises:
            RuntimeError: too many in a row.
        """
        if self._in_a_row <= self.max_skipped:
            return
        path = checkpoint_path(trainer)
        trainer.save_checkpoint(path)
        raise RuntimeError(
            f"{self._in_a_row} updates in a row had a gradient that is NaN or infinite, and were "
            f"skipped. The weights before them are in {path}; the prompts, in {SKIPPED} of the "
            "run's folder. Lower the learning rate, or raise the precision; guard.max_skipped="
            f"{self.max_skipped} is how many are borne."
        )

    def _note(self, trainer: Trainer, losses: list[Tensor]) -> None:
        buffer = train_rollouts(trainer)
        micro_batches = buffer.micro_batch_rollouts[buffer.position - len(losses) :][: len(losses)]
        finite = torch.stack(losses).isfinite().tolist()
        # Of all ranks: where one has a bad loss, what the others had is above suspicion.
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
