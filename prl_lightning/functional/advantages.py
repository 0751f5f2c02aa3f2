"""Outcome advantages: compare the rewards of a group's completions."""

from collections.abc import Callable

import torch
from torch import Tensor

from prl_lightning.functional.masks import at_least_float32, check_same_shape
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
    | none | 0 | on-policy distillation: the references teach alone |
    | maxrl | (r_i - mean r) / mean r, for rewards of 0 and more | MaxRL, arXiv 2602.02710 |
    | batch_std | (r_i - mean r) / std of all rewards passed | Lite PPO, arXiv 2508.08221, 4.1.2 |

    A group of two or more equal rewards has no outcome signal. Its advantages are zero for every
    kind, so `reward` and `raft` do not learn from a group that is right throughout, as their
    sources do. In a group of one, `reward` and `raft` return their values, and the kinds that
    subtract a mean return zero.

    There is no epsilon: all other groups are divided by exactly their standard deviation. The
    utility of 0/1 rewards is then 2·arcsin√p for large groups (PRL v2, arXiv 2601.10201,
    Proposition 3.1), that of dr_grpo and rloo is p, and that of maxrl log p. In a group of G, the
    expected gradient of maxrl is that of -Σ_{k<G} (1 - p)^k/k, the first terms of log p. (The
    paper's objective has the term k = G too, which needs an advantage of -1 in groups that are
    wrong throughout. The authors' code drops these groups, as this function does.)

    batch_std is the only kind that compares groups with each other. For a result that does not
    depend on ranks or micro-batches, pass the groups of all ranks at once.

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
            reward of a completion is not finite, the group size is 1 with rloo, or a reward is
            negative with maxrl.

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
        check_finite(rewards)
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


def _grpo(rewards: Tensor, members: Tensor, unbiased_std: bool) -> Tensor:
    unit = _in_unit_interval(rewards, members)
    return _centred(unit, members) / _std(unit, members, unbiased_std)


def _batch_std(rewards: Tensor, members: Tensor, unbiased_std: bool) -> Tensor:
    if not rewards.numel():
        return rewards
    whole = (1, -1, *rewards.shape[2:])  # one group of all completions
    # In float64, so that the order of the groups, which depends on the ranks, does not matter.
    of_whole = members.reshape(whole)
    unit = _in_unit_interval(rewards.double().reshape(whole), of_whole)
    centred = _centred(unit.reshape(rewards.shape), members)
    return (centred / _std(unit, of_whole, unbiased_std)).to(rewards.dtype)


def _maxrl(rewards: Tensor, members: Tensor, unbiased_std: bool) -> Tensor:
    negative = rewards[members & (rewards < 0)]
    if len(negative):
        raise ValueError(
            f"rewards has {negative[0].item()}: kind='maxrl' divides by a group's mean reward. "
            "Use rewards of 0 and above, such as 1 for right and 0 for wrong."
        )
    mean = _mean(rewards, members)
    return _centred(rewards, members) / torch.where(mean > 0, mean, torch.ones_like(mean))


def _rloo(rewards: Tensor, members: Tensor, unbiased_std: bool) -> Tensor:
    if rewards.shape[1] < 2:
        raise ValueError("group_size=1: rloo needs at least 2 completions; or use kind='reward'.")
    # r - (Σ - r)/(n - 1) = n/(n - 1)·(r - Σ/n)
    count = members.sum(1, keepdim=True, dtype=rewards.dtype)
    return _centred(rewards, members) * (count / (count - 1).clamp(min=1))


def _mean(rewards: Tensor, members: Tensor) -> Tensor:
    values = torch.where(members, rewards, torch.zeros_like(rewards))
    return values.sum(1, keepdim=True) / members.sum(1, keepdim=True).clamp(min=1)


def _centred(rewards: Tensor, members: Tensor) -> Tensor:
    centred = rewards - _mean(rewards, members)
    return torch.where(members, centred, torch.zeros_like(rewards))


def _in_unit_interval(rewards: Tensor, members: Tensor) -> Tensor:
    """Map rewards to [0, 1]: shift and scale cancel where a standard deviation divides.

    This keeps the variance from under- and overflowing, and far from zero.
    """
    low, high = _extremes(rewards, members)
    return (rewards - low) / torch.where(high > low, high - low, torch.ones_like(low))


def _std(rewards: Tensor, members: Tensor, unbiased: bool) -> Tensor:
    """Return the standard deviation along dimension 1, or 1 where rewards are equal."""
    count = members.sum(1, keepdim=True)
    squares = _centred(rewards, members).square().sum(1, keepdim=True)
    variance = squares / (count - int(unbiased)).clamp(min=1)
    low, high = _extremes(rewards, members)
    return torch.where(high > low, variance, torch.ones_like(variance)).sqrt()


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
        "none": lambda rewards, members, unbiased_std: torch.zeros_like(rewards),
        "raft": lambda rewards, members, unbiased_std: (rewards > 0).to(rewards.dtype),
        "maxrl": _maxrl,
        "batch_std": _batch_std,
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
            (N, G, T) with the KL inside the reward per step: compare them along dimension 1. In a
            run the N groups are those of all ranks.
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


def check_finite(rewards: Tensor) -> None:
    """Raise a ValueError that names the first reward that is not finite."""
    strange = ~rewards.isfinite()
    if strange.any():
        first = int(strange.int().argmax())
        raise ValueError(
            f"rewards[{first}]={rewards[first].item()}: a reward function must return finite "
            "numbers. Give a failed completion its lowest reward instead."
        )
