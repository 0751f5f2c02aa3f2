"""Bootstrap intervals against the exact distribution of a resampled mean."""

from __future__ import annotations

from itertools import product
from math import comb

import pytest
import torch

from prl_lightning.functional import bootstrap_interval


def binomial_quantile(size: int, share: float, level: float) -> float:
    """The least mean of `size` coins that `level` of all outcomes do not exceed."""
    total = 0.0
    for heads in range(size + 1):
        total += comb(size, heads) * share**heads * (1 - share) ** (size - heads)
        if total >= level:
            return heads / size
    return 1.0


@pytest.mark.parametrize(("right", "size"), [(30, 100), (3, 30), (250, 500)])
def test_ends_are_the_binomials(right: int, size: int) -> None:
    """A resampled share is a binomial one: 20,000 draws find its ends to within a problem."""
    values = torch.tensor([1.0] * right + [0.0] * (size - right))
    low, high = bootstrap_interval(values, resamples=20_000).tolist()
    assert low == pytest.approx(binomial_quantile(size, right / size, 0.025), abs=1.01 / size)
    assert high == pytest.approx(binomial_quantile(size, right / size, 0.975), abs=1.01 / size)


def test_ends_are_those_of_all_resamples_of_three() -> None:
    values = torch.tensor([0.0, 1.0, 5.0])
    means = torch.tensor([sum(draw) / 3 for draw in product([0.0, 1.0, 5.0], repeat=3)])
    expected = means.double().quantile(torch.tensor([0.1, 0.9]).double())
    found = bootstrap_interval(values, level=0.8, resamples=20_000)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_columns_are_drawn_together() -> None:
    values = torch.rand(20, 2, generator=torch.Generator().manual_seed(0))
    both = bootstrap_interval(values)
    assert torch.equal(both[:, 0], bootstrap_interval(values[:, 0]))
    assert torch.equal(both[:, 1], bootstrap_interval(values[:, 1]))


def test_equal_values_have_no_width_and_no_values_no_interval() -> None:
    assert bootstrap_interval(torch.full((7,), 0.25)).tolist() == [0.25, 0.25]
    assert bootstrap_interval(torch.empty(0)).isnan().tolist() == [True, True]
    assert bootstrap_interval(torch.empty(0, 3)).isnan().tolist() == [[True] * 3] * 2


def test_a_level_is_a_share() -> None:
    with pytest.raises(ValueError, match=r"level=95: must lie between 0 and 1"):
        bootstrap_interval(torch.ones(2), level=95)
    with pytest.raises(ValueError, match=r"level=0\.0: must lie between"):
        bootstrap_interval(torch.ones(2), level=0.0)


def test_so_many_means_are_drawn() -> None:
    """Of a single one both ends are it; of two that differ they do."""
    low, high = bootstrap_interval(torch.arange(100.0), resamples=1).tolist()
    assert low == high
    low, high = bootstrap_interval(torch.arange(100.0), resamples=2).tolist()
    assert low < high
