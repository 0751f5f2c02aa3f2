"""The policy loss, and the correction for an engine that disagrees with the trainer."""

from collections.abc import Callable

import torch
from torch import Tensor

from prl_lightning.functional.aggregation import TOKEN_MEAN, Aggregation, aggregate
from prl_lightning.functional.masks import (
    MAX_LOG_RATIO,
    at_least_float32,
    check_same_shape,
    keep_tokens,
)
from prl_lightning.functional.process import per_token
from prl_lightning.functional.registry import Registry

TokenLoss = Callable[[Tensor, Tensor, float, float], tuple[Tensor, Tensor]]
"""(ratio, advantages, clip_low, clip_high) -> (losses, is_clipped); see `register_loss`."""


def policy_loss(
    policy_logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    completion_mask: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    *,
    surrogate: str = "clip",
    aggregation: Aggregation = TOKEN_MEAN,
    token_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Aggregate a loss per token of the importance ratio ρ = π/π_old and the advantage A.

    | surrogate | loss of a token |
    | --- | --- |
    | clip | -min(ρ·A, clip(ρ, 1 - ε_low, 1 + ε_high)·A) |

    clip is PPO's surrogate (arXiv 1707.06347) with the two bounds of DAPO (arXiv 2503.14476). With
    the advantages of `prl_advantages` it is the loss of PRL (arXiv 2601.10201).

    log ρ is bounded to ±`MAX_LOG_RATIO`, so that ρ·A stays finite; beyond it the gradient is zero.

    Args:
        policy_logprobs: log π at the sampled tokens, with gradient, (B, T).
        old_logprobs: log π_old, the policy that sampled, (B, T); detached here.
        advantages: (B, T), or (B,) for one per completion; detached here.
        completion_mask: (B, T), true on completion tokens; nothing is read outside it.
        clip_low: ε_low.
        clip_high: ε_high.
        surrogate: a name of the table, or a registered one.
        aggregation: by default the token mean of this batch alone.
        token_weights: (B, T), multiplies each token's loss; see `importance_weights`.

    Returns:
        The loss, a scalar, and its stats, detached scalars over the completion tokens:
        `clip_fraction` (share of tokens where clipping changes the loss), `ratio_mean` and
        `ratio_max` (of ρ). Without tokens they are 0, 1 and 1.

    Raises:
        ValueError: shapes disagree, the surrogate is unknown, or see `aggregate`.

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
    losses, is_clipped = LOSSES[surrogate](ratio, weight, clip_low, clip_high)
    if token_weights is not None:
        losses = losses * keep_tokens(token_weights.detach(), completion_mask, "token_weights")
    loss = aggregate(losses, completion_mask, aggregation)
    return loss, _ratio_stats(ratio.detach(), is_clipped.detach(), completion_mask.bool())


def _clip(
    ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    plain = -ratio * advantages
    clipped = -ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    return torch.maximum(plain, clipped), clipped > plain


LOSSES: Registry[TokenLoss] = Registry(
    "surrogate", {"clip": _clip}, "register_loss(name, function)"
)


def register_loss(name: str, function: TokenLoss) -> None:
    """Add a loss per token.

    Call it in the module of your reward functions, which `rollout.rewards` of a configuration
    names. Then set `model.objective.surrogate` to the name. Registering your name again replaces
    the function.

    Args:
        name: not a built-in loss.
        function: (ratio, advantages, clip_low, clip_high) -> (losses, is_clipped), all (B, T).
            The ratio ρ = π/π_old has a gradient; advantages are detached. `is_clipped` is bool and
            only counted, in `clip_fraction`. Values outside the completion mask are ignored;
            there ρ is 1 and the advantage 0.

    Raises:
        ValueError: the name is built in.

    Example:
        >>> register_loss("plain", lambda ratio, a, low, high: (-ratio * a, ratio > 1 + high))
        >>> policy, old = torch.tensor([[2.0]]).log(), torch.tensor([[0.0]])
        >>> policy_loss(policy, old, torch.ones(1), torch.ones(1, 1), surrogate="plain")[0]
        tensor(-2.)
    """
    LOSSES.register(name, function)


def _ratio_stats(ratio: Tensor, is_clipped: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Compute the stats over the tokens inside the mask; without any, those of a ratio of 1."""
    # Sums over all entries: selecting those inside the mask would wait for the GPU to count them.
    count = mask.sum()
    zero, one = torch.zeros_like(ratio), ratio.new_ones(())
    # The ratio is positive, so the 0 outside the mask is never the maximum.
    largest = torch.where(mask, ratio, zero).amax() if mask.numel() else one
    return {
        "clip_fraction": (is_clipped & mask).to(ratio.dtype).sum() / count.clamp(min=1),
        "ratio_mean": torch.where(count > 0, torch.where(mask, ratio, zero).sum() / count, one),
        "ratio_max": torch.where(count > 0, largest, one),
    }


def importance_weights(old_logprobs: Tensor, rollout_logprobs: Tensor, cap: float) -> Tensor:
    """Return min(π_old/π_rollout, cap): truncated importance sampling.

    The engine that samples and the trainer compute slightly different probabilities from the same
    weights. The weight corrects the expectation per token; the cap bounds the variance (Ionides
    2008, "Truncated importance sampling").

    Args:
        old_logprobs: log π_old as the trainer computes it, (B, T).
        rollout_logprobs: log π_old as the engine reported it, (B, T).
        cap: largest weight, above 0.

    Returns:
        (B, T), detached; meaningless outside the completion mask.

    Raises:
        ValueError: the cap is not above 0 or shapes disagree.

    Example:
        >>> importance_weights(torch.tensor([[-1.0, -1.0]]), torch.tensor([[-1.0, -9.0]]), cap=2.0)
        tensor([[1., 2.]])
    """
    if not cap > 0:
        raise ValueError(f"cap={cap}: must be above 0, such as 2.0.")
    check_same_shape("BT", old_logprobs=old_logprobs, rollout_logprobs=rollout_logprobs)
    log_ratio = at_least_float32(old_logprobs) - at_least_float32(rollout_logprobs)
    return log_ratio.detach().exp().clamp(max=cap)
