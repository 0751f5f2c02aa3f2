import math
import statistics

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from prl_lightning.functional import (
    kl_in_reward_step_advantages,
    kl_in_reward_trajectory,
    outcome_advantages,
)

from .batches import Batch, batches, quick

KINDS = ["grpo", "dr_grpo", "rloo", "reward", "raft"]


def slow_group(rewards: list[float], kind: str, group_size: int, unbiased: bool) -> list[float]:
    """Each kind's equation over one group, in plain floats."""
    if group_size > 1 and max(rewards) == min(rewards):
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
    std = statistics.stdev(rewards) if unbiased else statistics.pstdev(rewards)
    return [c / std for c in centred]


def approx(want: list[float]) -> object:
    return pytest.approx(want, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@quick
@given(batch=batches(), unbiased=st.booleans())
def test_outcome_advantages_is_a_loop(kind: str, batch: Batch, unbiased: bool) -> None:
    group = batch.group_size
    assume(not (kind == "rloo" and group == 1))
    got = outcome_advantages(batch.rewards, group, kind, unbiased_std=unbiased).tolist()
    for start in range(0, len(got), group):
        rewards = batch.rewards[start : start + group].tolist()
        assert got[start : start + group] == approx(slow_group(rewards, kind, group, unbiased))


@pytest.mark.parametrize(
    ("kind", "want"),
    [
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


@quick
@given(batch=batches())
def test_dr_grpo_is_rloo_shrunk(batch: Batch) -> None:
    """r - Σ/G = (G - 1)/G·(r - (Σ - r)/(G - 1))."""
    group = max(2, batch.group_size)
    rewards = batch.rewards[: len(batch.rewards) // group * group]
    shrunk = outcome_advantages(rewards, group, "rloo") * (group - 1) / group
    torch.testing.assert_close(
        outcome_advantages(rewards, group, "dr_grpo"), shrunk, rtol=1e-9, atol=1e-12
    )


def test_unbiased_std_divides_by_one_less() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0])
    biased = outcome_advantages(rewards, 4)
    unbiased = outcome_advantages(rewards, 4, unbiased_std=True)
    torch.testing.assert_close(unbiased, biased * math.sqrt(3 / 4))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -2.3, 1e30, 1e-30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_equal_rewards_give_zeros(kind: str, value: float, dtype: torch.dtype) -> None:
    """Also for 0.1, whose float mean is not 0.1."""
    rewards = torch.full((7,), value, dtype=dtype)
    assert outcome_advantages(rewards, 7, kind).tolist() == [0.0] * 7


@pytest.mark.parametrize("kind", KINDS)
def test_advantages_are_detached(kind: str) -> None:
    rewards, delta = torch.rand(4, requires_grad=True), torch.rand(4, 3, requires_grad=True)
    mask = torch.ones(4, 3)
    assert not outcome_advantages(rewards, 4, kind).requires_grad
    assert not kl_in_reward_trajectory(rewards, delta, mask, 0.1).requires_grad
    assert not kl_in_reward_step_advantages(rewards, delta, mask, 0.1, 4, kind).requires_grad


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e30])
@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_grpo_does_not_depend_on_scale_and_shift(scale: float, shift: float) -> None:
    """1e30 squared is inf in float32, and 1e-6 is what others add to the std."""
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0]) * scale + shift * scale
    want = outcome_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), 4)
    torch.testing.assert_close(outcome_advantages(rewards, 4), want)


def test_grpo_of_neighbouring_floats() -> None:
    low = torch.tensor(0.1)
    rewards = torch.stack([low, torch.nextafter(low, torch.tensor(1.0))])
    assert outcome_advantages(rewards, 2).tolist() == [-1.0, 1.0]


@pytest.mark.parametrize("kind", ["reward", "raft"])
def test_a_group_of_one_is_plain_reinforce(kind: str) -> None:
    rewards = torch.tensor([1.0, 1.0, -2.0])
    want = [1.0, 1.0, -2.0] if kind == "reward" else [1.0, 1.0, 0.0]
    assert outcome_advantages(rewards, 1, kind).tolist() == want


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo"])
@pytest.mark.parametrize("unbiased", [False, True])
def test_a_group_of_one_has_no_deviation(kind: str, unbiased: bool) -> None:
    got = outcome_advantages(torch.tensor([1.0, -2.0]), 1, kind, unbiased_std=unbiased)
    assert got.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("kind", KINDS)
@quick
@given(batch=batches())
def test_order_of_groups_and_in_groups_changes_nothing(kind: str, batch: Batch) -> None:
    group = max(2, batch.group_size)
    rewards = batch.rewards[: len(batch.rewards) // group * group]
    generator = torch.Generator().manual_seed(batch.seed)
    rows = torch.arange(len(rewards)).reshape(-1, group)
    order = rows[torch.randperm(len(rows), generator=generator)]
    order = order[:, torch.randperm(group, generator=generator)].reshape(-1)
    want = outcome_advantages(rewards, group, kind)[order]
    torch.testing.assert_close(
        outcome_advantages(rewards[order], group, kind), want, rtol=1e-9, atol=1e-12
    )


def trajectory(batch: Batch, beta: float) -> list[float]:
    return [
        batch.rewards[i].item() - beta * sum(batch.log_ratios[i, t].item() for t in positions)
        for i, positions in enumerate(batch.rows())
    ]


@quick
@given(batch=batches(), beta=st.floats(0, 2))
def test_kl_in_reward_trajectory_is_a_loop(batch: Batch, beta: float) -> None:
    got = kl_in_reward_trajectory(batch.rewards, batch.log_ratios, batch.mask, beta)
    assert got.tolist() == approx(trajectory(batch, beta))


@pytest.mark.parametrize("kind", KINDS)
@quick
@given(batch=batches(), beta=st.sampled_from([0.0, 0.01, 2.0]), unbiased=st.booleans())
def test_kl_in_reward_step_advantages_is_a_loop(
    kind: str, batch: Batch, beta: float, unbiased: bool
) -> None:
    group = batch.group_size
    assume(not (kind == "rloo" and group == 1))
    got = step_advantages(batch, beta, kind, unbiased)
    want = torch.zeros(batch.mask.shape, dtype=torch.float64)
    for start in range(0, len(want), group):
        for t in range(want.shape[1]):
            members = [i for i in range(start, start + group) if batch.mask[i, t]]
            shaped = []
            for i in members:
                later = [j for j in batch.rows()[i] if j >= t]
                kl = sum(batch.log_ratios[i, j].item() for j in later)
                shaped.append(batch.rewards[i].item() - beta * kl)
            if members:
                values = slow_group(shaped, kind, group, unbiased)
                want[members, t] = torch.tensor(values, dtype=torch.float64)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def step_advantages(batch: Batch, beta: float, kind: str, unbiased: bool = False) -> Tensor:
    return kl_in_reward_step_advantages(
        batch.rewards,
        batch.log_ratios,
        batch.mask,
        beta,
        batch.group_size,
        kind,
        unbiased_std=unbiased,
    )


def test_kl_in_reward_step_by_hand() -> None:
    rewards, delta = torch.tensor([1.0, 0.0]), torch.tensor([[1.0, 2.0], [1.0, torch.nan]])
    mask = torch.tensor([[1, 1], [1, 0]])
    # Position 0: 1 - 0.1·3 = 0.7 and 0 - 0.1·1 = -0.1. Position 1: one member, no signal.
    got = kl_in_reward_step_advantages(rewards, delta, mask, 0.1, 2, "dr_grpo")
    torch.testing.assert_close(got, torch.tensor([[0.4, 0.0], [-0.4, 0.0]]))
    got = kl_in_reward_step_advantages(rewards, delta, mask, 0.1, 2, "grpo")
    torch.testing.assert_close(got, torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    got = kl_in_reward_step_advantages(rewards, delta, mask, 0.1, 2, "reward")
    torch.testing.assert_close(got, torch.tensor([[0.7, 0.0], [-0.1, 0.0]]))


@pytest.mark.parametrize("kind", KINDS)
def test_kl_in_reward_step_equals_outcome_when_beta_is_zero_and_all_are_as_long(kind: str) -> None:
    rewards = torch.tensor([1.0, 0.0, 0.5, 1.0, 1.0, 1.0])
    delta, mask = torch.randn(6, 4), torch.ones(6, 4)
    got = kl_in_reward_step_advantages(rewards, delta, mask, 0.0, 3, kind)
    want = outcome_advantages(rewards, 3, kind)[:, None].expand(6, 4)
    torch.testing.assert_close(got, want)


def test_kl_in_reward_step_of_first_token_is_the_trajectorys() -> None:
    rewards, delta, mask = torch.randn(4), torch.randn(4, 3), torch.ones(4, 3)
    step = kl_in_reward_step_advantages(rewards, delta, mask, 0.2, 4)
    shaped = kl_in_reward_trajectory(rewards, delta, mask, 0.2)
    torch.testing.assert_close(step[:, 0], outcome_advantages(shaped, 4))


def test_a_nan_on_a_completion_token_is_not_hidden() -> None:
    delta, mask = torch.tensor([[0.1, torch.nan], [0.2, 0.3]]), torch.ones(2, 2)
    got = kl_in_reward_step_advantages(torch.tensor([1.0, 0.0]), delta, mask, 0.1, 2)
    assert got.isnan().any(0).tolist() == [True, True]


@pytest.mark.parametrize(
    ("rewards", "group_size", "kind", "message"),
    [
        ([1.0, 0.0], 2, "ppo", "kind is 'ppo'.*grpo, dr_grpo, rloo, reward, raft"),
        ([1.0, 0.0, 1.0], 2, "grpo", "rewards has 3 values and group_size is 2.*whole groups"),
        ([1.0, 0.0], 0, "grpo", "group_size is 0"),
        ([[1.0, 0.0]], 2, "grpo", r"rewards has shape \(1, 2\).*\(B,\)"),
        ([1.0, math.nan], 2, "grpo", r"rewards\[1\] is nan.*finite"),
        ([-math.inf, 0.0], 2, "grpo", r"rewards\[0\] is -inf.*finite"),
        ([1.0, 0.0], 1, "rloo", "group_size is 1: rloo.*at least 2"),
    ],
)
def test_errors_name_the_field_the_value_and_the_mend(
    rewards: list[float], group_size: int, kind: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        outcome_advantages(torch.tensor(rewards), group_size, kind)


def test_kl_in_reward_errors() -> None:
    delta, mask = torch.zeros(2, 3), torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"rewards has shape \(3,\) and log_ratios \(2, 3\)"):
        kl_in_reward_trajectory(torch.zeros(3), delta, mask, 0.1)
    with pytest.raises(ValueError, match=r"rewards\[0\] is nan"):
        kl_in_reward_step_advantages(torch.full((2,), math.nan), delta, mask, 0.1, 2)


def test_no_completions() -> None:
    assert outcome_advantages(torch.zeros(0), 4).shape == (0,)
