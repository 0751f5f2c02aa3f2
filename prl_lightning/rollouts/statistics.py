"""What a reader of a training curve wants to know of an iteration's rollouts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from prl_lightning.types import Rollout


def describe(
    rollouts: Sequence[Rollout], group_size: int, sum_over_ranks: Callable[[Tensor], Tensor]
) -> dict[str, float]:
    """Rewards and lengths over the rollouts of all ranks, whatever their share.

    Args:
        rollouts: of this rank, groups contiguous.
        group_size: completions a prompt.
        sum_over_ranks: adds up a tensor of all ranks.

    Returns:
        Means, the population standard deviation of the reward, and the number of tokens.
    """
    rewards = torch.tensor([rollout.reward for rollout in rollouts], dtype=torch.float64)
    groups = rewards.view(-1, group_size)
    own = [
        len(rollouts),
        rewards.sum().item(),
        rewards.square().sum().item(),
        sum(len(rollout.completion.token_ids) for rollout in rollouts),
        sum(not rollout.completion.finished for rollout in rollouts),
        (groups == groups[:, :1]).all(1).sum().item() * group_size,
    ]
    summed = sum_over_ranks(torch.tensor(own, dtype=torch.float64))
    count, tokens = summed[0].item(), summed[3].item()
    reward, square, length, cut, without_signal = (summed[1:] / count).tolist()
    return {
        "reward": reward,
        "reward_std": max(square - reward**2, 0.0) ** 0.5,
        "groups_without_signal": without_signal,
        "completion_length": length,
        "cut_at_limit": cut,
        "tokens": tokens,
    }


def over_ranks(name: str) -> Literal["sum", "max", "mean"]:
    """How a value that each rank measures for itself becomes one.

    Failures add up; of the largest the largest counts, and of the times that of the slowest, for
    which the others wait.
    """
    if name.startswith("reward_failures/") or name == "unrewarded":
        return "sum"
    return "max" if name.endswith(("_max", "_seconds")) else "mean"
