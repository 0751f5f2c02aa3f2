"""What an update needs to know of the rollouts before it starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from prl_lightning.data import RolloutBuffer
from prl_lightning.functional import get_divergence
from prl_lightning.module import PRLModule
from prl_lightning.types import Rollout


def prepare_update(
    module: PRLModule,
    buffer: RolloutBuffer,
    group_size: int,
    sum_over_ranks: Callable[[Tensor], Tensor],
    is_trained: bool = True,
) -> None:
    """Give every rollout of a filled buffer its outcome advantage, and what that takes.

    With one update a rollout, and the KL outside the reward, rewards are all it takes: the policy
    of the update is the one that sampled, so no log-probabilities are computed here.

    Args:
        module: policy, reference and objective.
        buffer: holds whole groups, contiguous in ``buffer.rollouts``.
        group_size: completions a prompt.
        sum_over_ranks: adds up a tensor of all ranks.
        is_trained: updates follow; a second one needs the policy of the first.
    """
    objective, rollouts = module.objective, buffer.rollouts
    if objective.needs_log_ratios or (is_trained and buffer.num_updates > 1):
        _score(module, buffer)
    rewards = torch.tensor([rollout.reward for rollout in rollouts])
    if objective.needs_log_ratios:
        log_ratios, mask = _log_ratios(rollouts)
        mean_kl = None
        if objective.baseline:
            costs = get_divergence(objective.divergence).future(log_ratios)[mask]
            total, count = sum_over_ranks(torch.stack([costs.sum(), mask.sum()]))
            mean_kl = total / count
        advantages = objective.outcome_advantages(rewards, group_size, log_ratios, mask, mean_kl)
    else:
        advantages = objective.outcome_advantages(rewards, group_size)
    for rollout, advantage in zip(rollouts, advantages, strict=True):
        length = len(rollout.completion.token_ids)
        rollout.outcome_advantage = advantage[:length] if advantage.ndim else advantage


def _score(module: PRLModule, buffer: RolloutBuffer) -> None:
    """Note the log-probabilities of the policy that sampled and, if there is one, the reference.

    An older policy cannot be asked any more; what its engine reported is there already.
    """
    for index, rollouts in enumerate(buffer.micro_batch_rollouts):
        batch = buffer[index].to(module.device)
        known = batch.old_logprobs
        old_logprobs = (module.score(batch, "policy") if known is None else known).cpu()
        ref_logprobs = module.score(batch, "reference").cpu() if module.keeps_reference else None
        for row, rollout in enumerate(rollouts):
            length = len(rollout.completion.token_ids)
            rollout.old_logprobs = old_logprobs[row, :length]
            rollout.ref_logprobs = None if ref_logprobs is None else ref_logprobs[row, :length]


def _log_ratios(rollouts: Sequence[Rollout]) -> tuple[Tensor, Tensor]:
    """Log-ratios at sampling time and their mask, (B, T)."""
    rows = [
        rollout.old_logprobs - rollout.ref_logprobs
        for rollout in rollouts
        if rollout.old_logprobs is not None and rollout.ref_logprobs is not None
    ]
    mask = [torch.ones(len(row), dtype=torch.bool) for row in rows]
    return pad_sequence(rows, batch_first=True), pad_sequence(mask, batch_first=True)
