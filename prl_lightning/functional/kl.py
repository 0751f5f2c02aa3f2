"""Estimators of the KL to the reference, and the KL loss that PRL is compared with."""

from collections.abc import Callable

from torch import Tensor

from prl_lightning.functional.aggregation import AT_HAND, Totals, aggregate
from prl_lightning.functional.masks import (
    MAX_LOG_RATIO,
    at_least_float32,
    check_same_shape,
    keep_tokens,
)


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
        >>> import torch
        >>> kl_estimate(torch.tensor([[-1.0]]), torch.tensor([[-3.0]]), "k2")
        tensor([[2.]])
    """
    if estimator not in ESTIMATORS:
        raise ValueError(
            f"estimator is '{estimator}', which is none of {', '.join(ESTIMATORS)}: use one of them"
        )
    check_same_shape(policy_logprobs, ref_logprobs, "policy_logprobs", "ref_logprobs")
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
    totals: Totals = AT_HAND,
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
        totals: of the update; by default of these completions alone.

    Returns:
        A scalar.

    Raises:
        ValueError: as `kl_estimate` and `aggregate`.

    Example:
        >>> import torch
        >>> mask = torch.tensor([[1, 0]])
        >>> kl_loss(torch.tensor([[-1.0, 0.0]]), torch.tensor([[-3.0, 0.0]]), mask, "k1")
        tensor(2.)
    """
    estimates = kl_estimate(
        keep_tokens(policy_logprobs, completion_mask, "policy_logprobs"),
        keep_tokens(ref_logprobs, completion_mask, "ref_logprobs"),
        estimator,
    )
    return aggregate(estimates, completion_mask, aggregation, totals)
