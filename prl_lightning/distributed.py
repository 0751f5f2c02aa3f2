"""Gather and add up over the ranks of a run."""

from __future__ import annotations

from typing import Any, cast

import torch
from lightning.pytorch import Trainer
from torch import Tensor


def gather(value: Any, rank: int, ranks: int) -> list[Any] | None:
    """Collect one value from each rank on rank 0; every rank must call this.

    Args:
        value: any object that can be pickled.
        rank: of this process.
        ranks: number of processes.

    Returns:
        The values in the order of the ranks on rank 0, None on the others.
    """
    if ranks == 1:
        return [value]
    values = [None] * ranks if rank == 0 else None
    torch.distributed.gather_object(value, values)
    return values


def sum_over_ranks(trainer: Trainer, totals: Tensor) -> Tensor:
    """Add up a CPU tensor over all ranks; every rank must call this and gets the sum."""
    if trainer.world_size == 1:
        return totals
    summed = trainer.strategy.reduce(totals.to(trainer.strategy.root_device), reduce_op="sum")
    return cast(Tensor, summed).cpu()
