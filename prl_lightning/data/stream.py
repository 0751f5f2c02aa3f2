"""PromptStream: the endless stream of training prompts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch.utils.data import ConcatDataset

from prl_lightning.types import Prompt

# Part of every seed, so that training and evaluation never use the same seed.
TRAIN, EVAL = 0, 1


class PromptStream:
    """Pass after pass over the training prompts, each in an order of its own.

    The prompt of a position depends on the seed and the position alone.

    Args:
        prompts: of all sources.
        seed: of the order, and of the completions.
    """

    def __init__(self, prompts: ConcatDataset[Prompt], seed: int) -> None:
        self._prompts = prompts
        self._seed = seed
        self._pass: int | None = None  # number of the pass that _order belongs to

    def __getitem__(self, position: int) -> Prompt:
        """Return the prompt at a position."""
        return replace(self._prompts[self.row(position)], seed=seed_of(self._seed, TRAIN, position))

    def row(self, position: int) -> int:
        """Return the row of the data at a position."""
        size = len(self._prompts)
        number, place = divmod(position, size)
        if self._pass != number:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + number)
            self._pass, self._order = number, torch.randperm(size, generator=generator)
        return int(self._order[place])


def seed_of(*entropy: int) -> int:
    """Return a seed for a position in the data, below 2^62 to leave room for samples."""
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(2))
