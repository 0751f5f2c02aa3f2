"""The clipped policy loss, and the correction for an engine that disagrees with the trainer."""

import torch
from torch import Tensor

from prl_lightning.functional.aggregation import AT_HAND, Totals, aggregate
from prl_lightning.functional.masks import (
    MAX_LOG_RATIO,
    at_least_float32,
    check_same_shape,
    keep_tokens,
)
from prl_lightning.functional.process import per_token


def policy_loss(
    policy_logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    completion_mask: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    *,
    aggregation: str = "token_mean",
    totals: Totals = AT_HAND,
    token_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """-min(ρ·A, clip(ρ, 1 - ε_low, 1 + ε_high)·A), aggregated; ρ = π/π_old.

    PPO's clipped surrogate (arXiv 1707.06347) with the two bounds of DAPO (arXiv 2503.14476). With
    the advantages of `prl_advantages` it is the loss of PRL (arXiv 2601.10201).

    log ρ is bounded to ±`MAX_LOG_RATIO`, so that ρ·A stays finite; beyond it the gradient is zero.

    Args:
        policy_logprobs: log π at the sampled tokens, with gradient, (B, T).
        old_logprobs: log π_old, the policy that sampled, (B, T); detached here.
        advantages: (B, T), or (B,) where all tokens share one; detached here.
        completion_mask: (B, T), true on completion tokens; nothing is read outside it.
        clip_low: ε_low.
        clip_high: ε_high.
        aggregation: a kind of `aggregate`.
        totals: of the update; by default of these completions alone.
        token_weights: (B, T), multiplies each token's loss; see `importance_weights`.

    Returns:
        The loss, a scalar, and its stats, detached scalars over the completion tokens:
        `clip_fraction` (share of tokens where clipping changes the loss), `ratio_mean` and
        `ratio_max` (of ρ). Without tokens they are 0, 1 and 1.

    Raises:
        ValueError: if shapes disagree, or as `aggregate`.

    Example:
        >>> old = torch.tensor([[-1.0, -2.0]])
        >>> loss, stats = policy_loss(old, old, torch.tensor([0.5]), torch.ones(1, 2))
        >>> loss, stats["clip_fraction"]
        (tensor(-0.5000), tensor(0.))
    """
    log_ratio = keep_tokens(policy_logprobs, completion_mask, "policy_logprobs") - keep_tokens(
        old_logprobs.detach(), completion_mask, "old_logprobs"
    )
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    weight = per_token(advantages.detach(), completion_mask, "advantages")
    plain = -ratio * weight
    clipped = -ratio.clamp(1 - clip_low, 1 + clip_high) * weight
    losses = torch.maximum(plain, clipped)
    if token_weights is not None:
        losses = losses * keep_tokens(token_weights.detach(), completion_mask, "token_weights")
    loss = aggregate(losses, completion_mask, aggregation, totals)
    return loss, _ratio_stats(ratio.detach(), (clipped > plain).detach(), completion_mask.bool())


def _ratio_stats(ratio: Tensor, is_clipped: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Of the tokens inside the mask; as for a ratio of 1 where there are none."""
    # Sums over all entries: to pick those inside the mask, a GPU's count of them is waited for.
    count = mask.sum()
    zero, one = torch.zeros_like(ratio), ratio.new_ones(())
    # ratio is above 0, so that a 0 outside the mask is never the largest.
    largest = torch.where(mask, ratio, zero).amax() if mask.numel() else one
    return {
        "clip_fraction": (is_clipped & mask).to(ratio.dtype).sum() / count.clamp(min=1),
        "ratio_mean": torch.where(count > 0, torch.where(mask, ratio, zero).sum() / count, one),
        "ratio_max": torch.where(count > 0, largest, one),
    }


def importance_weights(old_logprobs: Tensor, rollout_logprobs: Tensor, cap: float) -> Tensor:
    """min(π_old/π_rollout, cap): truncated importance sampling for an engine that disagrees.

    The engine that samples and the trainer compute slightly different probabilities of the same
    weights; this corrects the expectation per token, the cap bounds the variance (Ionides 2008,
    "Truncated importance sampling").

    Args:
        old_logprobs: log π_old by the trainer, (B, T).
        rollout_logprobs: log π_old as the engine reported it, (B, T).
        cap: largest weight, above 0.

    Returns:
        (B, T), detached; meaningless outside the completion mask.

    Raises:
        ValueError: if the cap is not above 0 or shapes disagree.

    Example:
        >>> importance_weights(torch.tensor([[-1.0, -1.0]]), torch.tensor([[-1.0, -9.0]]), cap=2.0)
        tensor([[1., 2.]])
    """
    if not cap > 0:
        raise ValueError(f"cap is {cap}: it must be above 0; 2.0 is usual")
    check_same_shape(old_logprobs, rollout_logprobs, "old_logprobs", "rollout_logprobs")
    log_ratio = at_least_float32(old_logprobs) - at_least_float32(rollout_logprobs)
    return log_ratio.detach().exp().clamp(max=cap)
