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


@pytest.mark.parametrize(("right", "size"), [(30, 100), (3, 30)])
def test_ends_are_the_binomials(right: int, size: int) -> None:
    """A resampled share is a binomial one: 10,000 draws find its ends to within a problem."""
    values = torch.tensor([1.0] * right + [0.0] * (size - right))
    want = [binomial_quantile(size, right / size, level) for level in (0.025, 0.975)]
    found = bootstrap_interval(values, resamples=10_000).tolist()
    assert found == pytest.approx(want, abs=1.01 / size)


def test_ends_are_those_of_all_resamples_of_three() -> None:
    values = [0.0, 1.0, 5.0]
    means = torch.tensor([sum(draw) / 3 for draw in product(values, repeat=3)])
    expected = means.double().quantile(torch.tensor([0.1, 0.9]).double())
    found = bootstrap_interval(torch.tensor(values), level=0.8, resamples=10_000)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_columns_are_drawn_together() -> None:
    values = torch.rand(20, 2, generator=torch.Generator().manual_seed(0))
    columns = [bootstrap_interval(column) for column in values.T]
    assert torch.equal(bootstrap_interval(values), torch.stack(columns, dim=1))


def test_equal_values_have_no_width_and_no_values_no_interval() -> None:
    assert bootstrap_interval(torch.full((7,), 0.25)).tolist() == [0.25, 0.25]
    assert bootstrap_interval(torch.empty(0)).isnan().tolist() == [True, True]
    assert bootstrap_interval(torch.empty(0, 3)).isnan().tolist() == [[True] * 3] * 2


def test_the_ends_of_one_mean_are_equal_and_of_two_are_not() -> None:
    widths = [bootstrap_interval(torch.arange(100.0), resamples=count).diff() for count in (1, 2)]
    assert widths[0] == 0 < widths[1]


@pytest.mark.parametrize("level", [95, 0.0])
def test_a_level_is_a_share(level: float) -> None:
    with pytest.raises(ValueError, match=f"level={level}"):
        bootstrap_interval(torch.ones(2), level=level)
