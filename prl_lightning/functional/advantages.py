"""Outcome advantages: compare the rewards of a group's completions."""

from collections.abc import Callable

import torch
from torch import Tensor

from prl_lightning.functional.masks import (
    at_least_float32,
    check_same_shape,
    keep_tokens,
    suffix_sums,
)
from prl_lightning.functional.process import per_token
from prl_lightning.functional.registry import Registry

AdvantageFunction = Callable[[Tensor, Tensor, bool], Tensor]
"""(rewards, members, unbiased_std) -> advantages; see `register_advantage`."""


def outcome_advantages(
    rewards: Tensor,
    group_size: int,
    kind: str = "grpo",
    completion_mask: Tensor | None = None,
    *,
    unbiased_std: bool = False,
) -> Tensor:
    """Return A_i: the reward of completion i compared with the rewards of its group.

    | kind | A_i | source |
    | --- | --- | --- |
    | grpo | (r_i - mean r) / std r | GRPO, arXiv 2402.03300 |
    | dr_grpo | r_i - mean r | Dr. GRPO, arXiv 2503.20783 |
    | rloo | r_i - mean_{j≠i} r_j | RLOO, arXiv 2402.14740 |
    | reward | r_i | REINFORCE |
    | raft | 1 if r_i > 0 else 0 | RAFT, arXiv 2304.06767 |

    A group of two or more equal rewards has no outcome signal. Its advantages are zero for every
    kind, so `reward` and `raft` do not learn from a group that is right throughout, as their
    sources do. In a group of one, `reward` and `raft` return their values, and the kinds that
    subtract a mean return zero.

    There is no epsilon: all other groups are divided by exactly their standard deviation. The
    utility of 0/1 rewards is then 2·arcsin√p for large groups (PRL v2, arXiv 2601.10201,
    Proposition 3.1).

    A mean that includes the completion's own reward shrinks the expected gradient of the outcome,
    but not the gradient of the process term: dr_grpo is (G - 1)/G times rloo, and rloo has the
    expected gradient of E[r]. The completions to which raft gives zero still count as tokens and
    sequences where the loss is a mean.

    Rewards that differ between positions are compared separately at each position, over the
    completions of the group whose mask covers it.

    Args:
        rewards: (B,), or (B, T) with a mask; groups contiguous.
        group_size: G, completions per prompt; divides B.
        kind: a name of the table, or a registered one.
        completion_mask: (B, T), true on completion tokens; completions start in the same column.
        unbiased_std: divide the variance of grpo by the number of completions minus 1.

    Returns:
        The shape of rewards, zero outside the mask; detached, float32, or float64 if the rewards
        are.

    Raises:
        ValueError: the kind is unknown, B is not a multiple of the group size, shapes disagree, a
            reward of a completion is not finite, or the group size is 1 with rloo.

    Example:
        >>> rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 1.0])
        >>> outcome_advantages(rewards, group_size=3, kind="rloo")
        tensor([ 1.0000, -0.5000, -0.5000,  0.0000,  0.0000,  0.0000])
    """
    if group_size < 1 or len(rewards) % group_size:
        raise ValueError(
            f"rewards has {len(rewards)} rows and group_size={group_size}: pass whole groups."
        )
    if completion_mask is None:
        check_same_shape("B", rewards=rewards)
        _check_finite(rewards)
        members = torch.ones_like(rewards, dtype=torch.bool)
    else:
        check_same_shape("BT", rewards=rewards, completion_mask=completion_mask)
        members = completion_mask.bool()
    groups = (len(rewards) // group_size, group_size, *rewards.shape[1:])
    values, members = at_least_float32(rewards.detach()).reshape(groups), members.reshape(groups)
    advantages = ADVANTAGES[kind](values, members, unbiased_std)
    if group_size > 1:
        low, high = _extremes(values, members)
        # NaN is unequal to itself, so a group with a NaN is kept and the NaN stays visible.
        members = members & (high != low)
    return torch.where(members, advantages, torch.zeros_like(advantages)).reshape(rewards.shape)


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
    _check_finite(rewards)
    delta = keep_tokens(log_ratios.detach(), completion_mask, "log_ratios")
    outcome = per_token(rewards.detach(), completion_mask, "rewards")
    return keep_tokens(outcome - beta * suffix_sums(delta), completion_mask, "rewards")


def _grpo(rewards: Tensor, members: Tensor, unbiased_std: bool) -> Tensor:
    # Shift and scale cancel. Mapping the rewards to [0, 1] first keeps the variance from under- and
    # overflowing, and far from zero.
    low, high = _extremes(rewards, members)
    spread = torch.where(high > low, high - low, torch.ones_like(low))
    centred = _centred((rewards - low) / spread, members)
    count = members.sum(1, keepdim=True)
    variance = centred.square().sum(1, keepdim=True) / (count - int(unbiased_std)).clamp(min=1)
    return centred / torch.where(high > low, variance, torch.ones_like(variance)).sqrt()


def _rloo(rewards: Tensor, members: Tensor, unbiased_std: bool) -> Tensor:
    if rewards.shape[1] < 2:
        raise ValueError("group_size=1: rloo needs at least 2 completions; or use kind='reward'.")
    # r - (Σ - r)/(n - 1) = n/(n - 1)·(r - Σ/n)
    count = members.sum(1, keepdim=True, dtype=rewards.dtype)
    return _centred(rewards, members) * (count / (count - 1).clamp(min=1))


def _centred(rewards: Tensor, members: Tensor) -> Tensor:
    values = torch.where(members, rewards, torch.zeros_like(rewards))
    mean = values.sum(1, keepdim=True) / members.sum(1, keepdim=True).clamp(min=1)
    return torch.where(members, rewards - mean, torch.zeros_like(rewards))


def _extremes(rewards: Tensor, members: Tensor) -> tuple[Tensor, Tensor]:
    low = torch.where(members, rewards, torch.inf).amin(1, keepdim=True)
    high = torch.where(members, rewards, -torch.inf).amax(1, keepdim=True)
    return low, high


ADVANTAGES: Registry[AdvantageFunction] = Registry(
    "kind",
    {
        "grpo": _grpo,
        "dr_grpo": lambda rewards, members, unbiased_std: _centred(rewards, members),
        "rloo": _rloo,
        "reward": lambda rewards, members, unbiased_std: rewards,
        "raft": lambda rewards, members, unbiased_std: (rewards > 0).to(rewards.dtype),
    },
    "register_advantage(name, function)",
)


def register_advantage(name: str, function: AdvantageFunction) -> None:
    """Add a kind of outcome advantage.

    Call it in the module of your reward functions, which `rollout.rewards` of a configuration
    names. Then set `model.objective.outcome` to the name. Registering your name again replaces the
    function.

    Args:
        name: not a built-in kind.
        function: (rewards, members, unbiased_std) -> advantages. Rewards are (N, G), or
            (N, G, T) with the KL inside the reward per step: compare them along dimension 1.
            `members` is bool of that shape, False where a completion has no token. The result has
            that shape; it is replaced by zero outside `members` and in groups of equal rewards.

    Raises:
        ValueError: the name is built in.

    Example:
        >>> register_advantage("doubled", lambda rewards, members, unbiased_std: 2 * rewards)
        >>> outcome_advantages(torch.tensor([1.0, 0.0]), group_size=2, kind="doubled")
        tensor([2., 0.])
    """
    ADVANTAGES.register(name, function)


def _check_finite(rewards: Tensor) -> None:
    strange = ~rewards.isfinite()
    if strange.any():
        first = int(strange.int().argmax())
        raise ValueError(
            f"rewards[{first}]={rewards[first].item()}: a reward function must return finite "
            "numbers. Give a failed completion its lowest reward instead."
        )
