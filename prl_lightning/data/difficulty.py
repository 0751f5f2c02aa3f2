"""Difficulty: prompts that the policy always solves are drawn less often."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prl_lightning.distributed import all_gather
from prl_lightning.types import Rollout

MOST = 255  # of a counter of one byte


@dataclass(frozen=True)
class Difficulty:
    """When a prompt is drawn less often.

    Attributes:
        passes: a prompt counts as solved if all of its completions were correct each of the last
            ``passes`` times that it was sampled; one wrong completion ends that.
        keep: probability with which a solved prompt is drawn when its turn comes.

    Raises:
        ValueError: a value is out of range.
    """

    passes: int = 2
    keep: float = 0.25

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 1 <= self.passes <= MOST:
            raise ValueError(f"data.difficulty.passes={self.passes}: must be between 1 and {MOST}.")
        if not 0.01 <= self.keep < 1:
            raise ValueError(
                f"data.difficulty.keep={self.keep}: must be at least 0.01, so that a prompt that "
                "is forgotten is noticed, and below 1."
            )


class SolvedPrompts:
    """Count for each row of the training data how often in a row it was solved.

    Args:
        difficulty: when a prompt counts as solved, and how often it is then drawn.
        rows: of the training data; the counts are as many bytes.

    Attributes:
        counts: (rows,) uint8, up to ``difficulty.passes``; a part of every checkpoint.
    """

    def __init__(self, difficulty: Difficulty, rows: int) -> None:
        self.difficulty = difficulty
        self.counts: Tensor = torch.zeros(rows, dtype=torch.uint8)

    def is_drawn(self, row: int, chance: float) -> bool:
        """Whether the prompt of a row is drawn.

        Args:
            row: of the data.
            chance: uniform in [0, 1), a function of the position.
        """
        return int(self.counts[row]) < self.difficulty.passes or chance < self.difficulty.keep

    def observe(self, solved: Iterable[tuple[int, bool]]) -> dict[str, float]:
        """Count the groups of an iteration, equal on all ranks.

        Args:
            solved: row, and whether all completions were correct, in the order of the data.

        Returns:
            Values to log.
        """
        for row, is_solved in solved:
            count = int(self.counts[row]) + 1
            self.counts[row] = min(count, self.difficulty.passes) if is_solved else 0
        return {"solved_prompts": (self.counts >= self.difficulty.passes).double().mean().item()}


def solved_positions(
    rollouts: Sequence[Rollout], group_size: int, solved_at: float
) -> list[tuple[int, bool]]:
    """Return the position of every rank's groups, and whether all completions are correct.

    A collective.

    Args:
        rollouts: this rank's, groups contiguous.
        group_size: completions per prompt.
        solved_at: reward from which a completion is correct.
    """
    groups = [rollouts[i : i + group_size] for i in range(0, len(rollouts), group_size)]
    own = [
        (group[0].prompt.position, all(rollout.reward >= solved_at for rollout in group))
        for group in groups
    ]
    return sorted(found for share in all_gather(own) for found in share)
