"""What an update needs to know of the rollouts before it starts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from prl_lightning.data import RolloutBuffer
from prl_lightning.module import PRLModule
from prl_lightning.objective import Objective
from prl_lightning.types import Rollout


def prepare_update(module: PRLModule, buffer: RolloutBuffer, group_size: int) -> None:
    """Give every rollout of a filled buffer its outcome advantage, and what that takes.

    With one update a rollout, and the KL outside the reward, rewards are all it takes: the policy
    of the update is the one that sampled, so no log-probabilities are computed here.

    Args:
        module: policy, reference and objective.
        buffer: holds whole groups, contiguous in ``buffer.rollouts``.
        group_size: completions a prompt.
    """
    if module.objective.kl_in_reward or buffer.num_updates > 1:
        _score(module, buffer)
    advantages = _outcome_advantages(module.objective, buffer.rollouts, group_size)
    for rollout, advantage in zip(buffer.rollouts, advantages, strict=True):
        length = len(rollout.completion.token_ids)
        rollout.outcome_advantage = advantage[:length] if advantage.ndim else advantage


def _score(module: PRLModule, buffer: RolloutBuffer) -> None:
    """Note the log-probabilities of the policy that sampled and, if there is one, the reference."""
    for index, rollouts in enumerate(buffer.micro_batch_rollouts):
        batch = buffer[index].to(module.device)
        old_logprobs = module.score(batch, "policy").cpu()
        ref_logprobs = module.score(batch, "reference").cpu() if module.keeps_reference else None
        for row, rollout in enumerate(rollouts):
            length = len(rollout.completion.token_ids)
            rollout.old_logprobs = old_logprobs[row, :length]
            rollout.ref_logprobs = None if ref_logprobs is None else ref_logprobs[row, :length]


def _outcome_advantages(
    objective: Objective, rollouts: Sequence[Rollout], group_size: int
) -> Tensor:
    rewards = torch.tensor([rollout.reward for rollout in rollouts])
    if not objective.kl_in_reward:
        return objective.outcome_advantages(rewards, group_size)
    log_ratios = [
        rollout.old_logprobs - rollout.ref_logprobs
        for rollout in rollouts
        if rollout.old_logprobs is not None and rollout.ref_logprobs is not None
    ]
    mask = [torch.ones(len(row), dtype=torch.bool) for row in log_ratios]
    return objective.outcome_advantages(
        rewards,
        group_size,
        pad_sequence(log_ratios, batch_first=True),
        pad_sequence(mask, batch_first=True),
    )
