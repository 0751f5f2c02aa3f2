r"""Reward functions with TRL's signature, and their weighted sum.

>>> from prl_lightning.rewards import MathReward
>>> MathReward()(["1 + 1?"], [r"So it is \boxed{2}."], answer=["2"])
[1.0]
"""

from prl_lightning.rewards.calls import FailedCall
from prl_lightning.rewards.environment import EnvironmentReward
from prl_lightning.rewards.gym import ReasoningGymReward
from prl_lightning.rewards.length import SoftLengthPunishment
from prl_lightning.rewards.match import ExactMatch, RegexMatch
from prl_lightning.rewards.math import MathReward
from prl_lightning.rewards.protocol import NO_ANSWER, RewardFunction, completion_text
from prl_lightning.rewards.reward_sum import RewardScores, RewardSum
from prl_lightning.rewards.sandbox.limits import RewardLimits

__all__ = [
    "NO_ANSWER",
    "EnvironmentReward",
    "ExactMatch",
    "FailedCall",
    "MathReward",
    "ReasoningGymReward",
    "RegexMatch",
    "RewardFunction",
    "RewardLimits",
    "RewardScores",
    "RewardSum",
    "SoftLengthPunishment",
    "completion_text",
]
