"""The clipped policy loss, the KL loss, and how tokens become one number.

Every loss is a mean or a sum over an update, however the update is cut: pass the update's totals
(`num_tokens`, `num_sequences`), and the losses of its micro-batches or ranks add up to the loss of
the whole.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from prl_lightning.functional.masks import MAX_LOG_RATIO, at_least_float32, keep_tokens
from prl_lightning.functional.process import per_token

Count = int | float | Tensor


def policy_loss(
    policy_logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    completion_mask: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    *,
    aggregation: str = "token_mean",
    token_weights: Tensor | None = None,
    num_tokens: Count | None = None,
    num_sequences: Count | None = None,
    max_length: Count | None = None,
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
        token_weights: (B, T), multiplies each token's loss; see `importance_weights`.
        num_tokens: as in `aggregate`.
        num_sequences: as in `aggregate`.
        max_length: as in `aggregate`.

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
    loss = aggregate(
        losses,
        completion_mask,
        aggregation,
        num_tokens=num_tokens,
        num_sequences=num_sequences,
        max_length=max_length,
    )
    return loss, _ratio_stats(ratio.detach(), (clipped > plain).detach(), completion_mask.bool())


def _ratio_stats(ratio: Tensor, is_clipped: Tensor, mask: Tensor) -> dict[str, Tensor]:
    if not mask.any():
        return {
            "clip_fraction": ratio.new_zeros(()),
            "ratio_mean": ratio.new_ones(()),
            "ratio_max": ratio.new_ones(()),
        }
    return {
        "clip_fraction": is_clipped[mask].to(ratio.dtype).mean(),
        "ratio_mean": ratio[mask].mean(),
        "ratio_max": ratio[mask].max(),
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
    _check_same_shape(old_logprobs, rollout_logprobs, "old_logprobs", "rollout_logprobs")
    log_ratio = at_least_float32(old_logprobs) - at_least_float32(rollout_logprobs)
    return log_ratio.detach().exp().clamp(max=cap)


def kl_estimate(policy_logprobs: Tensor, ref_logprobs: Tensor, estimator: str = "k3") -> Tensor:
    """Per-token estimates of KL(π‖π_ref) from the sampled token, with gradient in π.

    | estimator | value, δ = log π - log π_ref | gradient of |
    | --- | --- | --- |
    | k1 | δ | k1 (its expectation is zero) |
    | k2 | δ²/2 | k2 |
    | k3 | exp(-δ) - 1 + δ | k3 |
    | k3+ | k3 | k2 |

    Schulman, "Approximating KL divergence" (2020); k3 is GRPO's (arXiv 2402.03300). In k3 δ is
    bounded below by -`MAX_LOG_RATIO`, and its gradient is zero there.

    Args:
        policy_logprobs: log π at the sampled tokens, with gradient, (B, T).
        ref_logprobs: log π_ref, (B, T); detached here.
        estimator: one of the table.

    Returns:
        (B, T); garbage where the inputs are, so mask it.

    Raises:
        ValueError: if the estimator is unknown or shapes disagree.

    Example:
        >>> kl_estimate(torch.tensor([[-1.0]]), torch.tensor([[-3.0]]), "k2")
        tensor([[2.]])
    """
    if estimator not in ESTIMATORS:
        raise ValueError(
            f"estimator is '{estimator}', which is none of {', '.join(ESTIMATORS)}: use one of them"
        )
    _check_same_shape(policy_logprobs, ref_logprobs, "policy_logprobs", "ref_logprobs")
    delta = at_least_float32(policy_logprobs) - at_least_float32(ref_logprobs.detach())
    return ESTIMATORS[estimator](delta)


def _k1(delta: Tensor) -> Tensor:
    return delta


def _k2(delta: Tensor) -> Tensor:
    return delta.square() / 2


def _k3(delta: Tensor) -> Tensor:
    bounded = delta.clamp(min=-MAX_LOG_RATIO)
    return (-bounded).expm1() + bounded


def _k3_plus(delta: Tensor) -> Tensor:
    k2 = _k2(delta)
    return _k3(delta).detach() + (k2 - k2.detach())


ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": _k1,
    "k2": _k2,
    "k3": _k3,
    "k3+": _k3_plus,
}


def kl_loss(
    policy_logprobs: Tensor,
    ref_logprobs: Tensor,
    completion_mask: Tensor,
    estimator: str = "k3",
    *,
    aggregation: str = "token_mean",
    num_tokens: Count | None = None,
    num_sequences: Count | None = None,
    max_length: Count | None = None,
) -> Tensor:
    """`kl_estimate` aggregated: the 'KL-loss' that PRL v2 (arXiv 2601.10201) compares with.

    Multiply by beta and add it to the policy loss. It regularises each token given its prefix and
    leaves out what the token does to later ones, so it is not the gradient of a sequence KL.

    Args:
        policy_logprobs: log π at the sampled tokens, with gradient, (B, T).
        ref_logprobs: log π_ref, (B, T); detached here.
        completion_mask: (B, T), true on completion tokens; nothing is read outside it.
        estimator: one of `kl_estimate`.
        aggregation: a kind of `aggregate`.
        num_tokens: as in `aggregate`.
        num_sequences: as in `aggregate`.
        max_length: as in `aggregate`.

    Returns:
        A scalar.

    Raises:
        ValueError: as `kl_estimate` and `aggregate`.

    Example:
        >>> mask = torch.tensor([[1, 0]])
        >>> kl_loss(torch.tensor([[-1.0, 0.0]]), torch.tensor([[-3.0, 0.0]]), mask, "k1")
        tensor(2.)
    """
    estimates = kl_estimate(
        keep_tokens(policy_logprobs, completion_mask, "policy_logprobs"),
        keep_tokens(ref_logprobs, completion_mask, "ref_logprobs"),
        estimator,
    )
    return aggregate(
        estimates,
        completion_mask,
        aggregation,
        num_tokens=num_tokens,
        num_sequences=num_sequences,
        max_length=max_length,
    )


def aggregate(
    values: Tensor,
    completion_mask: Tensor,
    kind: str = "token_mean",
    *,
    num_tokens: Count | None = None,
    num_sequences: Count | None = None,
    max_length: Count | None = None,
) -> Tensor:
    """One number from a value per token.

    | kind | value | source |
    | --- | --- | --- |
    | token_mean | Σ_i Σ_t v_{i,t} / num_tokens | DAPO, arXiv 2503.14476 |
    | sequence_mean | Σ_i (Σ_t v_{i,t} / T_i) / num_sequences | GRPO, arXiv 2402.03300 |
    | constant | Σ_i Σ_t v_{i,t} / (num_sequences·max_length) | Dr. GRPO, arXiv 2503.20783 |

    Args:
        values: (B, T); not read outside the mask.
        completion_mask: (B, T), true on completion tokens.
        kind: one of the table.
        num_tokens: completion tokens of the whole update; None counts this batch's.
        num_sequences: completions of the whole update; None counts this batch's that have a token.
        max_length: the completion limit in tokens, which only `constant` reads and needs.

    Returns:
        A scalar; 0 if there are no tokens.

    Raises:
        ValueError: if the kind is unknown, shapes disagree, or `constant` has no max_length.

    Example:
        >>> values, mask = torch.tensor([[1.0, 2.0], [6.0, 9.0]]), torch.tensor([[1, 1], [1, 0]])
        >>> aggregate(values, mask, "token_mean"), aggregate(values, mask, "sequence_mean")
        (tensor(3.), tensor(3.7500))
    """
    if kind not in AGGREGATIONS:
        raise ValueError(
            f"aggregation is '{kind}', which is none of {', '.join(AGGREGATIONS)}: use one of these"
        )
    values = keep_tokens(values, completion_mask, "values")
    lengths = completion_mask.bool().sum(-1)
    if num_tokens is None:
        num_tokens = lengths.sum().clamp(min=1)
    if num_sequences is None:
        num_sequences = (lengths > 0).sum().clamp(min=1)
    return AGGREGATIONS[kind](values, lengths, num_tokens, num_sequences, max_length)


def _token_mean(
    values: Tensor, lengths: Tensor, tokens: Count, sequences: Count, max_length: Count | None
) -> Tensor:
    return values.sum() / tokens


def _sequence_mean(
    values: Tensor, lengths: Tensor, tokens: Count, sequences: Count, max_length: Count | None
) -> Tensor:
    return (values.sum(-1) / lengths.clamp(min=1)).sum() / sequences


def _constant(
    values: Tensor, lengths: Tensor, tokens: Count, sequences: Count, max_length: Count | None
) -> Tensor:
    if max_length is None:
        # The batch's width is no substitute: it depends on padding and on the cut of the update.
        raise ValueError("max_length is None: aggregation 'constant' needs the completion limit")
    return values.sum() / (sequences * max_length)


AGGREGATIONS: dict[str, Callable[[Tensor, Tensor, Count, Count, Count | None], Tensor]] = {
    "token_mean": _token_mean,
    "sequence_mean": _sequence_mean,
    "constant": _constant,
}


def _check_same_shape(first: Tensor, second: Tensor, first_name: str, second_name: str) -> None:
    if first.shape != second.shape:
        raise ValueError(
            f"{first_name} has shape {tuple(first.shape)} and {second_name} "
            f"{tuple(second.shape)}: pass both as (B, T)"
        )
