"""EpochSizes: how an epoch is cut into updates, ranks and micro-batches."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EpochSizes:
    """The sizes of an epoch. Every division must be exact.

    Attributes:
        prompts: per epoch, over all ranks.
        group_size: completions per prompt.
        updates: optimizer updates per epoch.
        ranks: processes.
        micro_batches: per update and rank (the Trainer's accumulate_grad_batches).

    Raises:
        ValueError: a size below 1, or one that does not divide; the message has the arithmetic.
    """

    prompts: int
    group_size: int
    updates: int
    ranks: int
    micro_batches: int

    def __post_init__(self) -> None:
        """Check the divisions in the order in which an epoch is cut."""
        prompts = ("data.prompts_per_epoch", self.prompts)
        updates = ("data.updates_per_epoch", self.updates)
        micro_batches = ("trainer.accumulate_grad_batches", self.micro_batches)
        for name, size in (prompts, ("data.group_size", self.group_size), updates, micro_batches):
            if size < 1:
                raise ValueError(f"{name}={size}: must be at least 1.")
        completions = self.prompts * self.group_size // (self.updates * self.ranks)
        for (what, size), (by, parts) in (
            (prompts, updates),
            (("prompts per update", self.prompts // self.updates), ("ranks", self.ranks)),
            (("completions per update and rank", completions), micro_batches),
        ):
            if size % parts:
                raise ValueError(f"{what} ({size}) is not a multiple of {by} ({parts}): {self}")

    def __str__(self) -> str:
        """Return the arithmetic in one line."""
        completions = self.prompts * self.group_size
        update = completions / self.updates
        rank = update / self.ranks
        return (
            f"{self.prompts} prompts x {self.group_size} completions = {completions} per epoch; "
            f"/ {self.updates} updates = {update:g} per update; / {self.ranks} ranks = {rank:g} "
            f"per rank; / {self.micro_batches} micro-batches = {rank / self.micro_batches:g} "
            "completions in each"
        )
