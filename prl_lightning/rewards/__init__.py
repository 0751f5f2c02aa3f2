r"""Reward functions with TRL's signature, and what runs them.

>>> from prl_lightning.rewards import MathReward
>>> MathReward()(["1 + 1?"], [r"So it is \boxed{2}."], answer=["2"])
[1.0]
"""

from prl_lightning.rewards.base import (
    NO_ANSWER,
    RewardFunction,
    RewardScores,
    RewardSum,
    completion_text,
)
from prl_lightning.rewards.match import ExactMatch, RegexMatch
from prl_lightning.rewards.math import MathReward

__all__ = [
    "NO_ANSWER",
    "ExactMatch",
    "MathReward",
    "RegexMatch",
    "RewardFunction",
    "RewardScores",
    "RewardSum",
    "completion_text",
]
