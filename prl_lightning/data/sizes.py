"""EpochSizes: how an epoch is cut into updates, ranks and micro-batches."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EpochSizes:
    """The arithmetic of an epoch; every division is exact, or this is not made.

    Attributes:
        prompts: an epoch, over all ranks.
        group_size: completions a prompt.
        updates: optimizer updates an epoch.
        ranks: processes.
        micro_batches: an update on each rank (the Trainer's accumulate_grad_batches).

    Raises:
        ValueError: something does not divide; the message is the arithmetic.
    """

    prompts: int
    group_size: int
    updates: int
    ranks: int
    micro_batches: int

    def __post_init__(self) -> None:
        """Check the divisions in the order in which an epoch is cut."""
        for name, size in (
            ("data.prompts_per_epoch", self.prompts),
            ("data.group_size", self.group_size),
            ("data.updates_per_epoch", self.updates),
            ("trainer.accumulate_grad_batches", self.micro_batches),
        ):
            if size < 1:
                raise ValueError(f"{name}={size}: must be at least 1.")
        steps = (
            ("data.prompts_per_epoch", self.prompts, "data.updates_per_epoch", self.updates),
            ("prompts an update", self.prompts // self.updates, "ranks", self.ranks),
            (
                "completions an update on each rank",
                self.prompts * self.group_size // (self.updates * self.ranks),
                "trainer.accumulate_grad_batches",
                self.micro_batches,
            ),
        )
        for what, size, by, parts in steps:
            if size % parts:
                raise ValueError(f"{what} ({size}) is not a multiple of {by} ({parts}): {self}")

    def __str__(self) -> str:
        """The arithmetic in one line."""
        completions = self.prompts * self.group_size
        update = completions / self.updates
        rank = update / self.ranks
        return (
            f"{self.prompts} prompts x {self.group_size} completions = {completions} an epoch; "
            f"/ {self.updates} updates = {update:g} an update; / {self.ranks} ranks = {rank:g} a "
            f"rank; / {self.micro_batches} micro-batches = {rank / self.micro_batches:g} "
            "completions in each"
        )
