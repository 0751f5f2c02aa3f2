"""PromptStream: the endless stream of training prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import ConcatDataset

from prl_lightning.data.difficulty import Difficulty, SolvedPrompts, solved_positions
from prl_lightning.types import Prompt, Rollout

# Part of every seed, so that training, evaluation and drawing never use the same seed.
TRAIN, EVAL, DRAW = 0, 1, 2
SEEDS = 2**62


class PromptStream:
    """Pass after pass over the training prompts, each in an order of its own.

    The prompt of a position depends on the seed and the position alone.

    Args:
        prompts: of all sources; empty outside of training.
        seed: of the order, of the completions, and of what is passed over.
        difficulty: passes over prompts that are solved, see Difficulty.

    Attributes:
        solved: what has been counted for ``difficulty``; None without it.
    """

    def __init__(
        self,
        prompts: ConcatDataset[Prompt] | Sequence[Prompt],
        seed: int,
        difficulty: Difficulty | None = None,
    ) -> None:
        self.solved = None if difficulty is None else SolvedPrompts(difficulty, len(prompts))
        self._prompts = prompts
        self._seed = seed
        self._pass: int | None = None  # number of the pass that _order belongs to

    def __getitem__(self, position: int) -> Prompt:
        """Return the prompt at a position."""
        prompt = self._prompts[self.row(position)]
        return replace(prompt, seed=seed_of(self._seed, TRAIN, position), position=position)

    def positions(self, start: int, number: int) -> list[int]:
        """Return the next positions from ``start`` on whose prompts are drawn."""
        return list(islice(filter(self._is_drawn, count(start)), number))

    def observe(
        self, rollouts: Sequence[Rollout], group_size: int, solved_at: float
    ) -> dict[str, float]:
        """Count which prompts are solved; a collective. See ``solved_positions``.

        Returns:
            Values to log; none without ``difficulty``.
        """
        if self.solved is None:
            return {}
        found = solved_positions(rollouts, group_size, solved_at)
        return self.solved.observe((self.row(position), solved) for position, solved in found)

    def row(self, position: int) -> int:
        """Return the row of the data at a position."""
        size = len(self._prompts)
        number, place = divmod(position, size)
        if self._pass != number:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + number)
            self._pass, self._order = number, torch.randperm(size, generator=generator)
        return int(self._order[place])

    def state_dict(self) -> dict[str, Any]:
        """Return what ``observe`` has counted, for a checkpoint."""
        return {} if self.solved is None else {"solved": self.solved.counts.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint, unless it is of other data."""
        if self.solved is None:
            return
        counts = state.get("solved", self.solved.counts)
        if len(counts) == len(self.solved.counts):
            self.solved.counts = counts.clone()
        else:
            rank_zero_info(
                f"data.difficulty counts anew: the checkpoint is of {len(counts)} prompts, and "
                f"data.train has {len(self.solved.counts)}."
            )

    def _is_drawn(self, position: int) -> bool:
        if self.solved is None:
            return True
        chance = seed_of(self._seed, DRAW, position) / SEEDS
        return self.solved.is_drawn(self.row(position), chance)


def seed_of(*entropy: int) -> int:
    """Return a seed for a position in the data, below 2^62 to leave room for samples."""
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(2))
