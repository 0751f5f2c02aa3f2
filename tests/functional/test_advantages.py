import math
import statistics
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from prl_lightning.functional import (
    kl_in_reward_step,
    kl_in_reward_trajectory,
    outcome_advantages,
)
from prl_lightning.functional.advantages import ADVANTAGES

from .batches import Batch, assert_close, batches, quick

KINDS = ADVANTAGES.names()
OF_GROUP = [kind for kind in KINDS if kind != "batch_std"]


def slow_group(rewards: list[float], kind: str, group_size: int, unbiased: bool) -> list[float]:
    """Each kind's equation over one group, in plain floats."""
    if group_size > 1 and max(rewards) == min(rewards):
        return [0.0] * len(rewards)
    if kind == "none":
        return [0.0] * len(rewards)
    if kind == "reward":
        return rewards
    if kind == "raft":
        return [1.0 if r > 0 else 0.0 for r in rewards]
    if group_size == 1:
        return [0.0]
    if kind == "rloo":
        others = [rewards[:i] + rewards[i + 1 :] for i in range(len(rewards))]
        return [r - statistics.fmean(rest) for r, rest in zip(rewards, others, strict=True)]
    centred = [r - statistics.fmean(rewards) for r in rewards]
    if kind == "dr_grpo":
        return centred
    if kind == "maxrl":
        return [c / statistics.fmean(rewards) for c in centred]
    std = statistics.stdev(rewards) if unbiased else statistics.pstdev(rewards)
    return [c / std for c in centred]


def slow_shaped(batch: Batch, beta: float, first: int) -> list[float]:
    """r_i - β Σ_{j≥first} δ_{i,j} of each row."""
    return [
        batch.rewards[i].item() - beta * sum(batch.delta(i, [t for t in row if t >= first]))
        for i, row in enumerate(batch.rows())
    ]


@pytest.mark.parametrize("kind", OF_GROUP)
@quick
@given(batch=batches(), unbiased=st.booleans(), beta=st.sampled_from([0.0, 0.01, 2.0]))
def test_advantages_are_loops(kind: str, batch: Batch, unbiased: bool, beta: float) -> None:
    """Of completions, and of the completions that reach each position with the KL inside."""
    group = batch.group_size
    assume(not (kind == "rloo" and group == 1))
    if kind == "maxrl":
        batch, beta = replace(batch, rewards=batch.rewards.abs()), 0.0
    whole = outcome_advantages(batch.rewards, group, kind, unbiased_std=unbiased)
    shaped = kl_in_reward_step(batch.rewards, batch.log_ratios, batch.mask, beta)
    steps = outcome_advantages(shaped, group, kind, batch.mask, unbiased_std=unbiased)
    want = torch.zeros_like(steps)
    for start in range(0, len(whole), group):
        rows = range(start, start + group)
        rewards = batch.rewards[start : start + group].tolist()
        expected = slow_group(rewards, kind, group, unbiased)
        assert whole[start : start + group].tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)
        for t in range(want.shape[1]):
            values = slow_shaped(batch, beta, t)
            members = [i for i in rows if batch.mask[i, t]]
            if members:
                found = slow_group([values[i] for i in members], kind, group, unbiased)
                want[members, t] = torch.tensor(found, dtype=torch.float64)
    assert_close(steps, want)


def slow_batch_std(groups: list[list[float]], unbiased: bool) -> list[list[float]]:
    """(r - mean of the group) / (standard deviation of all rewards), of groups with a signal."""
    rewards = [reward for group in groups for reward in group]
    std = statistics.stdev if unbiased else statistics.pstdev
    return [
        [(r - statistics.fmean(group)) / std(rewards) if max(group) > min(group) else 0.0
         for r in group]
        for group in groups
    ]  # fmt: skip


@quick
@given(batch=batches(max_groups=5), unbiased=st.booleans())
def test_batch_std_is_a_loop(batch: Batch, unbiased: bool) -> None:
    """Of completions, and at each position of those that reach it; also with groups of one."""
    size = batch.group_size
    groups = [batch.rewards[i : i + size].tolist() for i in range(0, len(batch.rewards), size)]
    whole = outcome_advantages(batch.rewards, size, "batch_std", unbiased_std=unbiased)
    expected = [a for group in slow_batch_std(groups, unbiased) for a in group] if groups else []
    if size == 1:
        expected = [0.0] * len(whole)
    assert whole.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)

    shaped = kl_in_reward_step(batch.rewards, batch.log_ratios, batch.mask, 0.3)
    got = outcome_advantages(shaped, size, "batch_std", batch.mask, unbiased_std=unbiased)
    want = torch.zeros_like(got)
    for t in range(want.shape[1]):
        rows = [i for i in range(len(want)) if batch.mask[i, t]]
        at_t = [[i for i in rows if i // size == group] for group in range(len(groups))]
        at_t = [group for group in at_t if group]
        if len(rows) > 1:
            values = [[shaped[i, t].item() for i in group] for group in at_t]
            found = [a for group in slow_batch_std(values, unbiased) for a in group]
            want[rows, t] = torch.tensor(found, dtype=torch.float64)
    assert_close(got, want)


def test_batch_std_does_not_depend_on_the_order_of_the_groups() -> None:
    """To the bit, in float32: ranks are concatenated, and more ranks mean another order."""
    groups = torch.rand(64, 4, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    want = outcome_advantages(groups.flatten(), 4, "batch_std").view(64, 4)
    got = outcome_advantages(groups[order].flatten(), 4, "batch_std").view(64, 4)
    assert torch.equal(got, want[order])


@pytest.mark.parametrize(
    ("kind", "want"),
    [
        ("maxrl", [3.0, -1.0, -1.0, -1.0]),
        ("batch_std", [x / math.sqrt(15 / 64) for x in (0.75, -0.25, -0.25, -0.25)]),  # 5 of 8
        ("grpo", [math.sqrt(3), -1 / math.sqrt(3), -1 / math.sqrt(3), -1 / math.sqrt(3)]),
        ("dr_grpo", [0.75, -0.25, -0.25, -0.25]),
        ("rloo", [1.0, -1 / 3, -1 / 3, -1 / 3]),
        ("reward", [1.0, 0.0, 0.0, 0.0]),
        ("raft", [1.0, 0.0, 0.0, 0.0]),
    ],
)
def test_one_right_of_four(kind: str, want: list[float]) -> None:
    rewards = torch.tensor([1, 0, 0, 0, 1, 1, 1, 1])  # and a group without signal
    assert outcome_advantages(rewards, 4, kind).tolist() == pytest.approx([*want, 0, 0, 0, 0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_equal_rewards_give_zeros(kind: str, dtype: torch.dtype) -> None:
    """Also for 0.1, whose float mean is not 0.1."""
    values = torch.tensor([0.0, 1.0, 0.1, -2.3, 1e30, 1e-30], dtype=dtype)
    if kind == "maxrl":
        values = values.abs()
    assert outcome_advantages(values.repeat_interleave(7), 7, kind).tolist() == [0.0] * 42


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e30])
@pytest.mark.parametrize("shift", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["grpo", "batch_std"])
def test_a_deviation_cancels_scale_and_shift(kind: str, scale: float, shift: float) -> None:
    """1e30 squared is inf in float32, and 1e-6 is what others add to the std."""
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0]) * scale + shift * scale
    want = outcome_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), 4, kind)
    torch.testing.assert_close(outcome_advantages(rewards, 4, kind), want)


@quick
@given(batch=batches(), beta=st.floats(0, 2))
def test_kl_in_reward_trajectory_is_a_loop(batch: Batch, beta: float) -> None:
    got = kl_in_reward_trajectory(batch.rewards, batch.log_ratios, batch.mask, beta)
    assert got.tolist() == pytest.approx(slow_shaped(batch, beta, 0), rel=1e-9, abs=1e-12)


def test_kl_in_reward_step_by_hand() -> None:
    delta, mask = torch.tensor([[1.0, 2.0], [1.0, torch.nan]]), torch.tensor([[1, 1], [1, 0]])
    shaped = kl_in_reward_step(torch.tensor([1.0, 0.0]), delta, mask, 0.1)
    torch.testing.assert_close(shaped, torch.tensor([[0.7, 0.8], [-0.1, 0.0]]))
    # Position 0: 0.7 and -0.1. Position 1: one member, no signal.
    for kind, want in {"dr_grpo": [0.4, -0.4], "grpo": [1.0, -1.0], "reward": [0.7, -0.1]}.items():
        got = outcome_advantages(shaped, 2, kind, mask)
        torch.testing.assert_close(got, torch.tensor([[want[0], 0.0], [want[1], 0.0]]))


def test_a_nan_on_a_completion_token_is_not_hidden() -> None:
    delta, mask = torch.tensor([[0.1, torch.nan], [0.2, 0.3]]), torch.ones(2, 2)
    shaped = kl_in_reward_step(torch.tensor([1.0, 0.0]), delta, mask, 0.1)
    assert outcome_advantages(shaped, 2, "grpo", mask).isnan().any(0).tolist() == [True, True]


@pytest.mark.parametrize("kind", KINDS)
def test_advantages_are_detached(kind: str) -> None:
    rewards, delta = torch.rand(4, requires_grad=True), torch.rand(4, 3, requires_grad=True)
    mask = torch.ones(4, 3)
    assert not outcome_advantages(rewards, 4, kind).requires_grad
    assert not outcome_advantages(delta, 4, kind, mask).requires_grad
    for shape in (kl_in_reward_trajectory, kl_in_reward_step):
        assert not shape(rewards, delta, mask, 0.1).requires_grad


@pytest.mark.parametrize(
    ("rewards", "group_size", "kind", "mask", "message"),
    [
        ([1.0, 0.0], 2, "ppo", None, "kind='ppo'"),
        ([1.0, 0.0, 1.0], 2, "grpo", None, "3 rows and group_size=2"),
        ([1.0, 0.0], 0, "grpo", None, "group_size=0"),
        ([[1.0], [0.0]], 2, "grpo", None, r"rewards has shape \(2, 1\)"),
        ([[1.0], [0.0]], 2, "grpo", torch.ones(2, 2), r"completion_mask has shape \(2, 2\)"),
        ([1.0, math.nan], 2, "grpo", None, r"rewards\[1\]=nan"),
        ([-math.inf, 0.0], 2, "grpo", None, r"rewards\[0\]=-inf"),
        ([1.0, 0.0], 1, "rloo", None, "group_size=1: rloo"),
        ([1.0, -0.5], 2, "maxrl", None, r"rewards has -0\.5: kind='maxrl'"),
    ],
)
def test_errors(
    rewards: list[float], group_size: int, kind: str, mask: Tensor | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        outcome_advantages(torch.tensor(rewards), group_size, kind, mask)


def test_kl_in_reward_errors() -> None:
    delta, mask = torch.zeros(2, 3), torch.ones(2, 3)
    for shape in (kl_in_reward_trajectory, kl_in_reward_step):
        with pytest.raises(ValueError, match=r"rewards has shape \(3,\)"):
            shape(torch.zeros(3), delta, mask, 0.1)
    with pytest.raises(ValueError, match=r"rewards\[0\]=nan"):
        kl_in_reward_step(torch.full((2,), math.nan), delta, mask, 0.1)
