"""What a group compares instead of the plain rewards: with the KL in them, or decoupled."""

import torch
from torch import Tensor

from prl_lightning.functional.advantages import check_finite, outcome_advantages
from prl_lightning.functional.masks import (
    at_least_float32,
    check_same_shape,
    keep_tokens,
    suffix_sums,
)
from prl_lightning.functional.process import per_token


def decoupled_rewards(
    parts: Tensor, weights: Tensor, group_size: int, *, unbiased_std: bool = False
) -> Tensor:
    """Return Σ_k w_k (r_{k,i} - mean r_k) / std r_k: each reward function normalised in its group.

    From GDPO (arXiv 2601.05242, Eq. 4 to 6). The sum of several reward functions hides which of
    them a completion satisfies: (1, 0) and (0, 1) are equal in it. GDPO's advantages are the
    `outcome_advantages` of these sums with the kind batch_std; the mean of a group, and with it the
    mean of the batch that GDPO subtracts, is already zero.

    A function that has equal rewards in a group adds nothing there. A reward of NaN means that the
    function does not apply to the completion: it is left out of the group's statistics and adds 0.

    Args:
        parts: rewards of F functions, (B, F), NaN where not applicable; groups contiguous.
        weights: (F,).
        group_size: G, completions per prompt; divides B.
        unbiased_std: divide the variances by the number of completions minus 1.

    Returns:
        (B,), detached.

    Raises:
        ValueError: B is not a multiple of the group size, or parts is not (B, F).

    Example:
        >>> parts = torch.tensor([[1.0, 0.0], [0.0, 30.0], [1.0, 30.0], [0.0, 0.0]])
        >>> decoupled_rewards(parts, torch.tensor([1.0, 0.5]), group_size=4)
        tensor([ 0.5000, -0.5000,  1.5000, -1.5000])
    """
    applies = ~parts.isnan()
    normalised = outcome_advantages(
        torch.where(applies, parts, torch.zeros_like(parts)),
        group_size,
        "grpo",
        applies,
        unbiased_std=unbiased_std,
    )
    return normalised @ weights.to(normalised)


def kl_in_reward_trajectory(
    rewards: Tensor, log_ratios: Tensor, completion_mask: Tensor, beta: float
) -> Tensor:
    """Return r_i - β Σ_t δ_{i,t}: the reward minus the trajectory's KL.

    Its `outcome_advantages` are the 'KL-reward, trajectory' that PRL v2 (arXiv 2601.10201) compares
    with. The paper predicts that it collapses, and sees it.

    Args:
        rewards: (B,).
        log_ratios: δ = log π - log π_ref at the sampled tokens, (B, T); not read outside the mask.
        completion_mask: (B, T), true on completion tokens.
        beta: weight of the KL.

    Returns:
        (B,), detached.

    Raises:
        ValueError: shapes disagree.

    Example:
        >>> delta = torch.tensor([[0.5, 1.5]])
        >>> kl_in_reward_trajectory(torch.tensor([1.0]), delta, torch.ones(1, 2), beta=0.1)
        tensor([0.8000])
    """
    kl = keep_tokens(log_ratios.detach(), completion_mask, "log_ratios").sum(-1)
    check_same_shape("B", rewards=rewards, kl=kl)
    return at_least_float32(rewards.detach()) - beta * kl


def kl_in_reward_step(
    rewards: Tensor, log_ratios: Tensor, completion_mask: Tensor, beta: float
) -> Tensor:
    """Return r_i - β Σ_{j≥t} δ_{i,j}: the reward minus the KL from position t on.

    Its `outcome_advantages` with the mask are the 'KL-reward, step' that PRL v2 (arXiv 2601.10201)
    compares with.

    Args:
        rewards: (B,).
        log_ratios: δ = log π - log π_ref at the sampled tokens, (B, T); not read outside the mask.
        completion_mask: (B, T), true on completion tokens.
        beta: weight of the KL.

    Returns:
        (B, T), detached, zero outside the mask.

    Raises:
        ValueError: shapes disagree, or a reward is not finite.

    Example:
        >>> rewards, delta = torch.tensor([1.0, 0.0]), torch.tensor([[1.0, 2.0], [1.0, 0.0]])
        >>> mask = torch.tensor([[1, 1], [1, 0]])
        >>> kl_in_reward_step(rewards, delta, mask, beta=0.1)
        tensor([[ 0.7000,  0.8000],
                [-0.1000,  0.0000]])
    """
    check_finite(rewards)
    delta = keep_tokens(log_ratios.detach(), completion_mask, "log_ratios")
    outcome = per_token(rewards.detach(), completion_mask, "rewards")
    return keep_tokens(outcome - beta * suffix_sums(delta), completion_mask, "rewards")
