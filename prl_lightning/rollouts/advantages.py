"""Outcome advantages of rollouts, and the log-probabilities that the update needs beforehand."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from prl_lightning.data.rollouts import collate, split_by_tokens
from prl_lightning.distributed import sum_over_ranks
from prl_lightning.functional import get_divergence
from prl_lightning.module import PRLModule
from prl_lightning.types import Rollout


def set_advantages(
    module: PRLModule,
    rollouts: Sequence[Rollout],
    group_size: int,
    updates: int,
    micro_batches: int,
) -> None:
    """Compare each completion with its group: set ``outcome_advantage`` of every rollout.

    With one update per rollout and no KL inside the reward, rewards are all that is needed: the
    updated policy is the one that sampled, and nothing is scored here.

    Args:
        module: policy, reference and objective.
        rollouts: rewarded, groups contiguous.
        group_size: completions per prompt.
        updates: made of these rollouts; from the second on, the policy that sampled is gone.
        micro_batches: per update; decides how many completions are scored at once.
    """
    objective = module.objective
    if objective.needs_log_ratios or updates > 1:
        _score(module, split_by_tokens(rollouts, updates * micro_batches))
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
        length = rollout.completion.length
        rollout.outcome_advantage = advantage[:length] if advantage.ndim else advantage


def _score(module: PRLModule, micro_batches: Sequence[list[Rollout]]) -> None:
    """Set the log-probabilities of the policy that sampled and, if there is one, the reference.

    Stale rollouts keep the log-probabilities of the engine: the weights no longer exist.
    """
    for rollouts in micro_batches:
        batch = collate(rollouts, 1, 1).to(module.device)
        known = batch.old_logprobs
        old_logprobs = (module.score(batch, "policy") if known is None else known).cpu()
        ref_logprobs = module.score(batch, "reference").cpu() if module.keeps_reference else None
        for row, rollout in enumerate(rollouts):
            length = rollout.completion.length
            rollout.old_logprobs = old_logprobs[row, :length]
            rollout.ref_logprobs = None if ref_logprobs is None else ref_logprobs[row, :length]


def _log_ratios(rollouts: Sequence[Rollout]) -> tuple[Tensor, Tensor]:
    """Return the log-ratios at sampling time and the mask of sampled tokens, (B, T)."""
    rows = [
        rollout.old_logprobs - rollout.ref_logprobs
        for rollout in rollouts
        if rollout.old_logprobs is not None and rollout.ref_logprobs is not None
    ]
    mask = [torch.tensor(rollout.completion.is_sampled) for rollout in rollouts]
    return pad_sequence(rows, batch_first=True), pad_sequence(mask, batch_first=True)
