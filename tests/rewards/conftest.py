"""Scoring in the sandbox."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from prl_lightning.rewards import RewardLimits, RewardScores, RewardSum
from rewards.orders import TIGHT, obey


@pytest.fixture
def scored() -> Iterator[Callable[..., RewardScores]]:
    """Score texts by a function within limits; processes end with the test."""
    started: list[RewardSum] = []

    def score(
        texts: Sequence[str], function: Any = obey, limits: RewardLimits = TIGHT
    ) -> RewardScores:
        rewards = RewardSum([function], limits=limits)
        started.append(rewards)
        return rewards.score(["?"] * len(texts), texts, {"answer": ["1"] * len(texts)})

    yield score
    for rewards in started:
        rewards.stop()
