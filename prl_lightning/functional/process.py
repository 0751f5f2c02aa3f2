"""The process term, which Process Reward Learning adds to the outcome advantage of each token.

All results are detached: they are coefficients of ∇ log π and are not differentiated.
"""

from torch import Tensor

from prl_lightning.functional.divergences import Divergence, get_divergence
from prl_lightning.functional.masks import discounted_later_sums, keep_tokens, later_sums
from prl_lightning.functional.process_shapes import SHAPES
from prl_lightning.functional.steps import take_at_step_end


def process_term(
    log_ratios: Tensor,
    completion_mask: Tensor,
    divergence: str | Divergence = "reverse_kl",
    step_ends: Tensor | None = None,
    discount: float = 1.0,
    shape: str = "plain",
) -> Tensor:
    """Return reg_t = Σ_{j≥t} γ^{j-t} f(u_j) - f'(u_t)·u_t, the future regularisation.

    From PRL v2 (arXiv 2601.10201), Theorem 4.1. Constants that do not depend on the action are
    dropped, so for reverse KL it is Σ_{j≥t} δ_j. With `step_ends` every token of a step gets the
    value at the step's last token (PRL v1).

    γ = 1 is the gradient of the paper's objective. γ = 0 is the token's own term alone, as in
    on-policy distillation with a KL per token; anything between trades bias for variance. Tokens
    outside the mask do not count in j - t.

    Sums are in float32, or float64 if the input is. Log-ratios are summed unbounded; before one is
    exponentiated it is bounded to ±`MAX_LOG_RATIO`.

    Args:
        log_ratios: δ = log π - log π_ref at the sampled tokens, (B, T); not read outside the mask.
        completion_mask: (B, T), true on completion tokens.
        divergence: a name of `get_divergence`, or a `Divergence`.
        step_ends: bool (B, T), true on the last token of each step; None for one step per token.
        discount: γ, from 0 to 1.
        shape: what becomes of the term, a name of `register_shape`.

    Returns:
        (B, T), zero outside the mask.

    Raises:
        ValueError: shapes disagree, or the divergence or shape is unknown.

    Example:
        >>> import torch
        >>> process_term(torch.tensor([[0.5, -0.25, 1.0]]), torch.tensor([[1, 1, 1]]))
        tensor([[1.2500, 0.7500, 1.0000]])
    """
    generator = get_divergence(divergence)
    delta = keep_tokens(log_ratios.detach(), completion_mask, "log_ratios")
    future = keep_tokens(generator.future(delta), completion_mask, "divergence")
    later = discounted_later_sums(future, completion_mask, discount)
    reg = keep_tokens(generator.own(delta) + later, completion_mask, "divergence")
    if step_ends is not None:
        reg = take_at_step_end(reg, completion_mask, step_ends)
    return SHAPES[shape](reg, completion_mask.bool())


def process_baseline(completion_mask: Tensor, mean_kl: Tensor) -> Tensor:
    """Return b_t = (T_i - t)·mean token KL: the expected sum of f(u) over the tokens after t.

    This is the optional baseline of PRL v2 for the k3 divergences, whose terms are never negative;
    the paper sees no gain. To use it, add β·b to the outcome advantages: A - β(reg - b) =
    (A + βb) - β·reg. T_i depends on later actions, so the baseline biases the gradient.

    Args:
        completion_mask: (B, T), true on completion tokens.
        mean_kl: scalar, mean of f(u) over the tokens of the whole rollout.

    Returns:
        (B, T) in the dtype of `mean_kl`, zero outside the mask.

    Example:
        >>> import torch
        >>> process_baseline(torch.ones(1, 3), mean_kl=torch.tensor(0.5))
        tensor([[1.0000, 0.5000, 0.0000]])
    """
    tokens = completion_mask.bool().to(mean_kl.dtype)
    return tokens * later_sums(tokens) * mean_kl


def prl_advantages(
    outcome_advantages: Tensor,
    log_ratios: Tensor,
    completion_mask: Tensor,
    beta: float,
    divergence: str | Divergence = "reverse_kl",
    step_ends: Tensor | None = None,
) -> Tensor:
    """Return A_{i,t} = sg(A_i - β·reg_{i,t}): the advantage of PRL, also known as FRPO.

    PRL v2 (arXiv 2601.10201), Eq. 5.1; with `step_ends` PRL v1. Outcome and process are decoupled:
    A_i is computed from the unmodified rewards, and the process term is subtracted afterwards.

    Args:
        outcome_advantages: A, (B,), or (B, T) if it differs between tokens.
        log_ratios: δ = log π - log π_ref at the sampled tokens, (B, T); not read outside the mask.
        completion_mask: (B, T), true on completion tokens.
        beta: weight of the regulariser; PRL v1 writes η = 1/β.
        divergence: a name of `get_divergence`, or a `Divergence`.
        step_ends: bool (B, T), true on the last token of each step; None for one step per token.

    Returns:
        (B, T), detached, zero outside the mask.

    Raises:
        ValueError: shapes disagree or the divergence is unknown.

    Example:
        >>> import torch
        >>> delta, mask = torch.tensor([[0.5, -0.25, 0.0]]), torch.tensor([[1, 1, 0]])
        >>> prl_advantages(torch.tensor([1.0]), delta, mask, beta=0.1)
        tensor([[0.9750, 1.0250, 0.0000]])
    """
    reg = process_term(log_ratios, completion_mask, divergence, step_ends)
    outcome = per_token(outcome_advantages.detach(), completion_mask, "outcome_advantages")
    return keep_tokens(outcome - beta * reg, completion_mask, "outcome_advantages")


def process_rewards(
    rewards: Tensor, log_ratios: Tensor, completion_mask: Tensor, beta: float
) -> Tensor:
    """Return r_t = r - β Σ_{j>t} δ_j: the process reward of the prefix up to and including t.

    PRL v1 and v2 (arXiv 2601.10201), Eq. 5.4, for display and analysis. Consecutive prefixes
    differ by β·δ, and the process reward of the whole completion is its outcome reward.

    Args:
        rewards: r, (B,).
        log_ratios: δ, (B, T); not read outside the mask.
        completion_mask: (B, T), true on completion tokens.
        beta: weight of the regulariser.

    Returns:
        (B, T), detached, zero outside the mask.

    Raises:
        ValueError: shapes disagree.

    Example:
        >>> import torch
        >>> process_rewards(torch.tensor([1.0]), torch.tensor([[4.0, 2.0]]), torch.ones(1, 2), 0.1)
        tensor([[0.8000, 1.0000]])
    """
    delta = keep_tokens(log_ratios.detach(), completion_mask, "log_ratios")
    outcome = per_token(rewards.detach(), completion_mask, "rewards")
    return keep_tokens(outcome - beta * later_sums(delta), completion_mask, "rewards")


def per_token(values: Tensor, completion_mask: Tensor, name: str) -> Tensor:
    """Expand values of (B,) or (B, T) to (B, T), zero outside the mask.

    Args:
        values: (B,) or (B, T).
        completion_mask: (B, T), true on completion tokens.
        name: what error messages call `values`.

    Returns:
        (B, T).

    Raises:
        ValueError: values has another shape.

    Example:
        >>> import torch
        >>> per_token(torch.tensor([2.0]), torch.tensor([[1, 0]]), "rewards")
        tensor([[2., 0.]])
    """
    if values.shape == completion_mask.shape[:1]:
        values = values[:, None].expand(completion_mask.shape)
    return keep_tokens(values, completion_mask, name)
