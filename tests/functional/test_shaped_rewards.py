"""Rewards of several functions, decoupled; test_advantages.py has those with the KL in them."""

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prl_lightning.functional import decoupled_rewards, outcome_advantages

from .batches import quick


def slow_gdpo(
    parts: list[list[float | None]], weights: list[float], group_size: int, unbiased: bool
) -> list[float]:
    """GDPO's advantages by its equations, in plain floats, with a mean over the batch as well."""
    deviation = statistics.stdev if unbiased else statistics.pstdev
    sums = [0.0] * len(parts)
    for k, weight in enumerate(weights):
        for start in range(0, len(parts), group_size):
            rows = range(start, start + group_size)
            own = {i: r for i in rows if (r := parts[i][k]) is not None}
            if own and max(own.values()) > min(own.values()):
                mean, std = statistics.fmean(own.values()), deviation(own.values())
                for i, r in own.items():
                    sums[i] += weight * (r - mean) / std
    if max(sums) == min(sums):
        return [0.0] * len(sums)
    return [(total - statistics.fmean(sums)) / deviation(sums) for total in sums]


reward = st.one_of(st.none(), st.floats(-3, 3).map(lambda r: round(r, 2)), st.sampled_from([0, 1]))


@quick
@given(data=st.data(), groups=st.integers(1, 4), size=st.integers(2, 4), unbiased=st.booleans())
def test_gdpo_is_a_loop(data: st.DataObject, groups: int, size: int, unbiased: bool) -> None:
    weights = data.draw(st.lists(st.sampled_from([1.0, 0.5, -2.0]), min_size=1, max_size=3))
    row = st.lists(reward, min_size=len(weights), max_size=len(weights))
    parts = data.draw(st.lists(row, min_size=groups * size, max_size=groups * size))
    rewards = torch.tensor([[math.nan if r is None else r for r in own] for own in parts]).double()
    sums = decoupled_rewards(rewards, torch.tensor(weights), size, unbiased_std=unbiased)
    got = outcome_advantages(sums, size, "batch_std", unbiased_std=unbiased)
    want = slow_gdpo(parts, weights, size, unbiased)
    assert sums.dtype == torch.float64
    if max(map(abs, sums.tolist())) > 1e-9:  # else two functions cancel, and rounding decides
        assert got.tolist() == pytest.approx(want, rel=1e-6, abs=1e-6)


def test_a_sum_hides_which_function_is_satisfied() -> None:
    """Equal sums of 1, and a weight of 2 for the second function, which is rare: r2 is worth more.

    Group statistics by hand: r1 = (1, 1, 1, 0) has deviation √3/4, as has r2 = (0, 0, 0, 1).
    """
    parts = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    plain = outcome_advantages(parts.sum(1), 4, "grpo")
    assert plain.tolist() == [0.0] * 4
    got = decoupled_rewards(parts, torch.tensor([1.0, 2.0]), 4)
    one = 1 / math.sqrt(3)
    assert got.tolist() == pytest.approx([-one] * 3 + [3 * one])
