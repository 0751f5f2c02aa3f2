"""A callback that makes updates unusable; ranks that torchrun starts import it by this name."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor


class Poison(Callback):
    """Make the gradient of some updates unusable, on the last rank alone.

    Args:
        updates: their numbers.
        value: what one entry becomes.
        in_loss: already the loss, of the update's last micro-batch.
    """

    def __init__(self, updates: list[int], value: float, in_loss: bool = False) -> None:
        self.updates = updates
        self.value = value
        self.in_loss = in_loss
        self.batches = 0

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        self.batches += 1
        is_last = self.batches % trainer.accumulate_grad_batches == 0
        if self.in_loss and is_last and self.is_now(trainer):
            loss.mul_(self.value)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.in_loss and self.is_now(trainer):
            parameter = next(p for p in pl_module.parameters() if p.grad is not None)
            grad: Any = parameter.grad
            getattr(grad, "_local_tensor", grad).flatten()[0] = self.value

    def is_now(self, trainer: Trainer) -> bool:
        update = (self.batches - 1) // trainer.accumulate_grad_batches
        return update in self.updates and trainer.global_rank == trainer.world_size - 1
