"""Outcome advantages: what a completion's reward says beside the others of its group.

A kind is a function (rewards, members, unbiased_std) -> advantages over tensors (N, G, T), with its
statistics along G. `members` says who takes part: with the KL inside the reward, per position, only
the completions that reach it do.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from prl_lightning.functional.masks import at_least_float32, keep_tokens
from prl_lightning.functional.process import process_rewards

Kind = Callable[[Tensor, Tensor, bool], Tensor]


def outcome_advantages(
    rewards: Tensor, group_size: int, kind: str = "grpo", *, unbiased_std: bool = False
) -> Tensor:
    """A_i from the rewards of completion i's group.

    | kind | A_i | source |
    | --- | --- | --- |
    | grpo | (r_i - mean r) / std r | GRPO, arXiv 2402.03300 |
    | dr_grpo | r_i - mean r | Dr. GRPO, arXiv 2503.20783 |
    | rloo | r_i - mean_{j≠i} r_j | RLOO, arXiv 2402.14740 |
    | reward | r_i | REINFORCE |
    | raft | 1 if r_i > 0 else 0 | RAFT, arXiv 2304.06767 |

    A group of two or more equal rewards has no outcome signal and gets zeros, whatever the kind; so
    `reward` and `raft` leave out what their sources learn from a group that is right throughout. A
    group of one has nothing to be equal to: `reward` and `raft` are then plain, and the kinds that
    subtract a mean give zero. There is no epsilon: groups without spread are handled, and the
    others are divided by exactly their standard deviation, which makes the utility of 0/1 rewards
    2·arcsin√p as groups grow (PRL v2, arXiv 2601.10201, Proposition 3.1).

    A mean that contains the completion's own reward shrinks the expected gradient of the outcome,
    and not that of a process term beside it: dr_grpo is (G - 1)/G of rloo, whose expected gradient
    is E[r]'s. raft's zeros count as tokens and completions where a loss is a mean.

    Args:
        rewards: (B,), groups contiguous.
        group_size: G, completions of one prompt; divides B.
        kind: one of the table.
        unbiased_std: divide grpo's variance by G - 1 instead of G.

    Returns:
        (B,) detached, float32, or float64 if the rewards are.

    Raises:
        ValueError: if the kind is unknown, rewards is not (B,) with B a multiple of the group size,
            a reward is not finite, or rloo meets a group of one.

    Example:
        >>> rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 1.0])
        >>> outcome_advantages(rewards, group_size=3, kind="rloo")
        tensor([ 1.0000, -0.5000, -0.5000,  0.0000,  0.0000,  0.0000])
    """
    _check_rewards(rewards, group_size)
    groups = at_least_float32(rewards.detach()).reshape(-1, group_size, 1)
    members = torch.ones_like(groups, dtype=torch.bool)
    return _group_advantages(groups, members, kind, unbiased_std).reshape(-1)


def kl_in_reward_trajectory(
    rewards: Tensor, log_ratios: Tensor, completion_mask: Tensor, beta: float
) -> Tensor:
    """r_i - β Σ_t δ_{i,t}: the reward with the trajectory's KL inside.

    The 'KL-reward, trajectory' that PRL v2 (arXiv 2601.10201) compares with: its advantages are
    `outcome_advantages` of this. The paper predicts and sees it collapse.

    Args:
        rewards: (B,).
        log_ratios: δ = log π - log π_ref at the sampled tokens, (B, T); not read outside the mask.
        completion_mask: (B, T), true on completion tokens.
        beta: weight of the KL.

    Returns:
        (B,), detached.

    Raises:
        ValueError: if shapes disagree.

    Example:
        >>> delta = torch.tensor([[0.5, 1.5]])
        >>> kl_in_reward_trajectory(torch.tensor([1.0]), delta, torch.ones(1, 2), beta=0.1)
        tensor([0.8000])
    """
    delta = keep_tokens(log_ratios.detach(), completion_mask, "log_ratios")
    if rewards.shape != delta.shape[:1]:
        raise ValueError(
            f"rewards has shape {tuple(rewards.shape)} and log_ratios {tuple(delta.shape)}: pass "
            "rewards as (B,), one for each row"
        )
    return at_least_float32(rewards.detach()) - beta * delta.sum(-1)


def kl_in_reward_step_advantages(
    rewards: Tensor,
    log_ratios: Tensor,
    completion_mask: Tensor,
    beta: float,
    group_size: int,
    kind: str = "grpo",
    *,
    unbiased_std: bool = False,
) -> Tensor:
    """Outcome advantages of r_i - β Σ_{j≥t} δ_{i,j}, position by position.

    The 'KL-reward, step' that PRL v2 (arXiv 2601.10201) compares with. The statistics at position t
    are over the completions of the group whose mask covers t; where only one does, or all agree,
    the advantage is zero.

    Args:
        rewards: (B,), groups contiguous.
        log_ratios: δ = log π - log π_ref at the sampled tokens, (B, T); not read outside the mask.
        completion_mask: (B, T), true on completion tokens; completions start in the same column.
        beta: weight of the KL.
        group_size: G, divides B.
        kind: one of `outcome_advantages`.
        unbiased_std: divide grpo's variance by the members less one.

    Returns:
        (B, T), detached, zero outside the mask.

    Raises:
        ValueError: as `outcome_advantages`, and if shapes disagree.

    Example:
        >>> rewards, delta = torch.tensor([1.0, 0.0]), torch.tensor([[1.0, 2.0], [1.0, 0.0]])
        >>> mask = torch.tensor([[1, 1], [1, 0]])
        >>> kl_in_reward_step_advantages(rewards, delta, mask, 0.1, group_size=2, kind="dr_grpo")
        tensor([[ 0.4000,  0.0000],
                [-0.4000,  0.0000]])
    """
    _check_rewards(rewards, group_size)
    # A prefix's process reward leaves out the token's own KL, which is still to be paid here.
    own = beta * keep_tokens(log_ratios.detach(), completion_mask, "log_ratios")
    shaped = process_rewards(rewards, log_ratios, completion_mask, beta) - own
    groups = (len(rewards) // group_size, group_size, shaped.shape[-1])
    members = completion_mask.bool().reshape(groups)
    return _group_advantages(shaped.reshape(groups), members, kind, unbiased_std).reshape(
        shaped.shape
    )


def _group_advantages(rewards: Tensor, members: Tensor, kind: str, unbiased_std: bool) -> Tensor:
    if kind not in KINDS:
        raise ValueError(f"kind is '{kind}', which is none of {', '.join(KINDS)}: use one of these")
    group_size = rewards.shape[1]
    if kind == "rloo" and group_size < 2:
        raise ValueError("group_size is 1: rloo leaves one out and needs at least 2; or use reward")
    advantages = KINDS[kind](rewards, members, unbiased_std)
    keep = members
    if group_size > 1:
        low, high = _extremes(rewards, members)
        # A NaN must not pass for agreement: it is unequal to everything, and stays visible.
        keep = members & (high != low)
    return torch.where(keep, advantages, torch.zeros_like(advantages))


def _grpo(rewards: Tensor, members: Tensor, unbiased_std: bool) -> Tensor:
    # Invariant to shift and scale, so rewards are first mapped to [0, 1] with both ends taken: the
    # variance then neither under- nor overflows and is far from zero.
    low, high = _extremes(rewards, members)
    spread = torch.where(high > low, high - low, torch.ones_like(low))
    centred = _centred((rewards - low) / spread, members)
    count = members.sum(1, keepdim=True)
    variance = centred.square().sum(1, keepdim=True) / (count - int(unbiased_std)).clamp(min=1)
    return centred / torch.where(high > low, variance, torch.ones_like(variance)).sqrt()


def _dr_grpo(rewards: Tensor, members: Tensor, unbiased_std: bool) -> Tensor:
    return _centred(rewards, members)


def _rloo(rewards: Tensor, members: Tensor, unbiased_std: bool) -> Tensor:
    # r - (Σ - r)/(n - 1) = n/(n - 1)·(r - Σ/n)
    count = members.sum(1, keepdim=True, dtype=rewards.dtype)
    return _centred(rewards, members) * (count / (count - 1).clamp(min=1))


def _reward(rewards: Tensor, members: Tensor, unbiased_std: bool) -> Tensor:
    return rewards


def _raft(rewards: Tensor, members: Tensor, unbiased_std: bool) -> Tensor:
    return (rewards > 0).to(rewards.dtype)


KINDS: dict[str, Kind] = {
    "grpo": _grpo,
    "dr_grpo": _dr_grpo,
    "rloo": _rloo,
    "reward": _reward,
    "raft": _raft,
}


def _centred(rewards: Tensor, members: Tensor) -> Tensor:
    values = torch.where(members, rewards, torch.zeros_like(rewards))
    mean = values.sum(1, keepdim=True) / members.sum(1, keepdim=True).clamp(min=1)
    return torch.where(members, rewards - mean, torch.zeros_like(rewards))


def _extremes(rewards: Tensor, members: Tensor) -> tuple[Tensor, Tensor]:
    low = torch.where(members, rewards, torch.inf).amin(1, keepdim=True)
    high = torch.where(members, rewards, -torch.inf).amax(1, keepdim=True)
    return low, high


def _check_rewards(rewards: Tensor, group_size: int) -> None:
    if rewards.ndim != 1:
        raise ValueError(f"rewards has shape {tuple(rewards.shape)}: pass (B,), groups contiguous")
    if group_size < 1 or len(rewards) % group_size:
        raise ValueError(
            f"rewards has {len(rewards)} values and group_size is {group_size}: pass whole groups, "
            "a multiple of group_size"
        )
    strange = ~rewards.isfinite()
    if strange.any():
        first = int(strange.int().argmax())
        raise ValueError(
            f"rewards[{first}] is {rewards[first].item()}: a reward function must return finite "
            "numbers; give a failed completion its lowest reward instead"
        )
