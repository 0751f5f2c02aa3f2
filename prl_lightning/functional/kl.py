"""Estimators of the KL to the reference, and the KL loss that PRL is compared with."""

from collections.abc import Callable

from torch import Tensor

from prl_lightning.functional.aggregation import TOKEN_MEAN, Aggregation, aggregate
from prl_lightning.functional.masks import (
    MAX_LOG_RATIO,
    at_least_float32,
    check_same_shape,
    keep_tokens,
)
from prl_lightning.functional.registry import Registry


def kl_estimate(policy_logprobs: Tensor, ref_logprobs: Tensor, estimator: str = "k3") -> Tensor:
    """Estimate KL(π‖π_ref) at each sampled token, with gradient in π.

    | estimator | value, δ = log π - log π_ref | gradient of |
    | --- | --- | --- |
    | k1 | δ | k1 (its expectation is zero) |
    | k2 | δ²/2 | k2 |
    | k3 | exp(-δ) - 1 + δ | k3 |
    | k3+ | k3 | k2 |

    Schulman, "Approximating KL divergence" (2020); k3 is the estimator of GRPO (arXiv 2402.03300).
    In k3, δ is bounded below by -`MAX_LOG_RATIO`, and the gradient is zero below it.

    Args:
        policy_logprobs: log π at the sampled tokens, with gradient, (B, T).
        ref_logprobs: log π_ref, (B, T); detached here.
        estimator: a name of the table.

    Returns:
        (B, T). Padding is not masked.

    Raises:
        ValueError: the estimator is unknown or shapes disagree.

    Example:
        >>> import torch
        >>> kl_estimate(torch.tensor([[-1.0]]), torch.tensor([[-3.0]]), "k2")
        tensor([[2.]])
    """
    check_same_shape("BT", policy_logprobs=policy_logprobs, ref_logprobs=ref_logprobs)
    delta = at_least_float32(policy_logprobs) - at_least_float32(ref_logprobs.detach())
    return ESTIMATORS[estimator](delta)


def _k2(delta: Tensor) -> Tensor:
    return delta.square() / 2


def _k3(delta: Tensor) -> Tensor:
    bounded = delta.clamp(min=-MAX_LOG_RATIO)
    return (-bounded).expm1() + bounded


def _k3_plus(delta: Tensor) -> Tensor:
    k2 = _k2(delta)
    return _k3(delta).detach() + (k2 - k2.detach())


ESTIMATORS: Registry[Callable[[Tensor], Tensor]] = Registry(
    "estimator",
    {"k1": lambda delta: delta, "k2": _k2, "k3": _k3, "k3+": _k3_plus},
)


def kl_loss(
    policy_logprobs: Tensor,
    ref_logprobs: Tensor,
    completion_mask: Tensor,
    estimator: str = "k3",
    aggregation: Aggregation = TOKEN_MEAN,
) -> Tensor:
    """Aggregate `kl_estimate`: the 'KL-loss' that PRL v2 (arXiv 2601.10201) compares with.

    Multiply by beta and add it to the policy loss. It regularises each token given its prefix and
    ignores the effect of the token on later ones, so it is not the gradient of a sequence KL.

    Args:
        policy_logprobs: log π at the sampled tokens, with gradient, (B, T).
        ref_logprobs: log π_ref, (B, T); detached here.
        completion_mask: (B, T), true on completion tokens; nothing is read outside it.
        estimator: see `kl_estimate`.
        aggregation: by default the token mean of this batch alone.

    Returns:
        A scalar.

    Raises:
        ValueError: see `kl_estimate` and `aggregate`.

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
    return aggregate(estimates, completion_mask, aggregation)
