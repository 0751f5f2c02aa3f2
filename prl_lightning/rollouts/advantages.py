"""Outcome advantages of rollouts, and the log-probabilities that the update needs beforehand."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from prl_lightning.data.rollouts import MicroBatches, collate
from prl_lightning.distributed import all_gather, rank
from prl_lightning.functional import decoupled_rewards, get_divergence
from prl_lightning.module import PRLModule
from prl_lightning.objective import Objective
from prl_lightning.types import Rollout


def set_advantages(
    module: PRLModule,
    rollouts: Sequence[Rollout],
    group_size: int,
    updates: int,
    pieces: MicroBatches,
) -> None:
    """Compare each completion with its group: set ``outcome_advantage`` of every rollout.

    It also sets ``in_loss``; a completion that is left out of the loss is compared all the same.

    With one update per rollout and no KL inside the reward, rewards are all that is needed: the
    updated policy is the one that sampled, and nothing is scored here. A collective: an advantage
    may compare the groups of all ranks.

    Args:
        module: policy, reference and objective.
        rollouts: rewarded, groups contiguous.
        group_size: completions per prompt.
        updates: made of these rollouts; from the second on, the policy that sampled is gone.
        pieces: how many completions are scored at once.
    """
    objective = module.objective
    if objective.needs_log_ratios or updates > 1:
        _score(module, pieces.cut(rollouts))
    for rollout, advantage in zip(rollouts, _compare(objective, rollouts, group_size), strict=True):
        completion = rollout.completion
        rollout.outcome_advantage = advantage[: completion.length] if advantage.ndim else advantage
        rollout.in_loss = completion.finished or not objective.mask_truncated


def _compare(objective: Objective, rollouts: Sequence[Rollout], group_size: int) -> Tensor:
    """Compute the advantages over the groups of all ranks, and return this rank's rows."""
    log_ratios = _log_ratios(rollouts) if objective.needs_log_ratios else []
    # Not needed without log-ratios.
    is_sampled = [torch.tensor(r.completion.is_sampled) for r in rollouts if log_ratios]
    shares = all_gather((_rewards(objective, rollouts, group_size), log_ratios, is_sampled))
    start = sum(len(rewards) for rewards, _, _ in shares[: rank()])
    rewards = torch.cat([rewards for rewards, _, _ in shares])
    advantages = _advantages(
        objective,
        rewards,
        group_size,
        [row for _, rows, _ in shares for row in rows],
        [row for _, _, rows in shares for row in rows],
    )
    return advantages[start : start + len(rollouts)]


def _advantages(
    objective: Objective,
    rewards: Tensor,
    group_size: int,
    log_ratios: list[Tensor],
    is_sampled: list[Tensor],
) -> Tensor:
    if not objective.needs_log_ratios:
        return objective.outcome_advantages(rewards, group_size)
    padded = pad_sequence(log_ratios, batch_first=True)
    mask = pad_sequence(is_sampled, batch_first=True)
    mean_kl = None
    if objective.baseline:
        costs = get_divergence(objective.divergence).future(padded[..., 0])[mask]
        mean_kl = costs.sum() / mask.sum()
    return objective.outcome_advantages(rewards, group_size, padded, mask, mean_kl)


def _rewards(objective: Objective, rollouts: Sequence[Rollout], group_size: int) -> Tensor:
    """Return what a group compares, before any KL, (B,)."""
    if not objective.decouple_rewards:
        return torch.tensor([rollout.reward for rollout in rollouts])
    parts = torch.tensor([rollout.reward_parts for rollout in rollouts])  # (B, F, 2)
    weights, values = parts[0, :, 0], parts[:, :, 1]
    return decoupled_rewards(values, weights, group_size, unbiased_std=objective.unbiased_std)


def _score(module: PRLModule, micro_batches: Sequence[list[Rollout]]) -> None:
    """Set the log-probabilities of the policy that sampled and, if there is one, the reference.

    Stale rollouts keep the log-probabilities of the engine: the weights no longer exist.
    """
    for rollouts in micro_batches:
        batch = collate(rollouts, 1, 1).to(module.device)
        known = batch.old_logprobs
        old_logprobs = (module.score(batch) if known is None else known).cpu()
        ref_logprobs = module.score_references(batch).cpu() if module.references else None
        for row, rollout in enumerate(rollouts):
            length = rollout.completion.length
            rollout.old_logprobs = old_logprobs[row, :length]
            rollout.ref_logprobs = None if ref_logprobs is None else ref_logprobs[row, :length]


def _log_ratios(rollouts: Sequence[Rollout]) -> list[Tensor]:
    """Return the log-ratios at sampling time, (T, K) of each rollout."""
    return [
        rollout.old_logprobs[:, None] - rollout.ref_logprobs
        for rollout in rollouts
        if rollout.old_logprobs is not None and rollout.ref_logprobs is not None
    ]
