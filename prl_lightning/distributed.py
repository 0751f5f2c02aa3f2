"""Gather, add up and share over the ranks of a run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed


def gather(value: Any) -> list[Any] | None:
    """Collect one value from each rank on rank 0; every rank must call this.

    Args:
        value: any object that can be pickled.

    Returns:
        The values in the order of the ranks on rank 0, None on the others.
    """
    if _ranks() == 1:
        return [value]
    values = [None] * _ranks() if is_first_rank() else None
    distributed.gather_object(value, values)
    return values


def all_gather(value: Any) -> list[Any]:
    """Collect one value from each rank on every rank, in their order; every rank must call this."""
    shares: list[Any] = [value] * _ranks()
    if len(shares) > 1:
        distributed.all_gather_object(shares, value)
    return shares


def max_over_ranks(value: int) -> int:
    """Return the largest value of all ranks on each of them; every rank must call this."""
    return max(all_gather(value))


def sum_over_ranks(totals: Tensor) -> Tensor:
    """Add up a CPU tensor over all ranks; every rank must call this and gets the sum."""
    shares = all_gather(totals)
    return torch.stack(shares).sum(0) if len(shares) > 1 else totals


def rank() -> int:
    """Index of this process among the ranks of the run."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def is_first_rank() -> bool:
    """Whether this process has rank 0 of the run."""
    return rank() == 0


def from_first_rank(value: Any, group: distributed.ProcessGroup | None = None) -> Any:
    """Return rank 0's value on all ranks; every rank must call this.

    Args:
        value: any object that can be pickled; ignored on the other ranks.
        group: of all ranks; by default the run's.
    """
    if _ranks() == 1:
        return value
    values = [value]
    distributed.broadcast_object_list(values, group=group)
    return values[0]


def own_group() -> distributed.ProcessGroup | None:
    """Return another group of all ranks, or None for one rank; every rank must call this.

    Its collectives may run in a thread: they are not matched with those of the trainer.
    """
    return distributed.new_group(backend="gloo") if _ranks() > 1 else None


def _ranks() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1
