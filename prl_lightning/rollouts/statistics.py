"""Statistics of an iteration's rollouts for the training curves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from prl_lightning.distributed import sum_over_ranks
from prl_lightning.types import Rollout


def describe(
    rollouts: Sequence[Rollout],
    group_size: int,
    sampling_seconds: float,
    is_rewarded: bool = True,
) -> dict[str, float]:
    """Summarise rewards and lengths over the rollouts of all ranks.

    Args:
        rollouts: of this rank, groups contiguous.
        group_size: completions per prompt.
        sampling_seconds: time that the engine needed.
        is_rewarded: whether the completions have rewards; otherwise nothing is said of them.

    Returns:
        Means, the population standard deviation of the reward, the number of sampled tokens, the
        longest completion of this rank, and sampled tokens per second.
    """
    rewards = torch.tensor([rollout.reward for rollout in rollouts], dtype=torch.float64)
    groups = rewards.view(-1, group_size)
    lengths = [rollout.completion.length for rollout in rollouts]
    own = [
        len(rollouts),
        rewards.sum().item(),
        rewards.square().sum().item(),
        sum(lengths),
        sum(rollout.completion.num_sampled for rollout in rollouts),
        sum(not rollout.completion.finished for rollout in rollouts),
        (groups == groups[:, :1]).all(1).sum().item() * group_size,
    ]
    summed = sum_over_ranks(torch.tensor(own, dtype=torch.float64))
    count, tokens = summed[0].item(), summed[4].item()
    reward, square, length, _, cut, without_signal = (summed[1:] / count).tolist()
    of_rewards = {
        "reward": reward,
        "reward_std": max(square - reward**2, 0.0) ** 0.5,
        "groups_without_signal": without_signal,
    }
    return (of_rewards if is_rewarded else {}) | {
        "completion_length": length,
        "completion_length_max": max(lengths),
        "cut_at_limit": cut,
        "tokens": tokens,
        "tokens_per_second": tokens / sampling_seconds,
    }


def describe_episodes(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Summarise the turns of all ranks.

    Args:
        rollouts: of this rank.

    Returns:
        Means over episodes of sampled turns, of calls, and of calls that returned an error; and the
        share of episodes whose environment failed.
    """
    completions = [rollout.completion for rollout in rollouts]
    roles = [message["role"] for completion in completions for message in completion.messages]
    own = [
        len(completions),
        roles.count("assistant"),
        roles.count("tool"),
        sum(completion.call_errors for completion in completions),
        sum(bool(completion.failure) for completion in completions),
    ]
    count, *totals = sum_over_ranks(torch.tensor(own, dtype=torch.float64)).tolist()
    names = ("turns", "calls", "call_errors", "environment_failures")
    return {name: total / count for name, total in zip(names, totals, strict=True)}


def reduction_of(name: str) -> Literal["sum", "max", "mean"]:
    """Name the reduction over ranks of a logged value.

    Failures add up. Maxima and times take the maximum, since the ranks wait for the slowest.
    """
    if name.startswith(("reward/", "task_reward/", "level/")):  # the rest may be any name
        return "mean"
    if name.startswith("reward_failures/") or name == "unrewarded":
        return "sum"
    return "max" if name.endswith(("_max", "_seconds")) else "mean"
