from fractions import Fraction
from itertools import combinations
from math import comb

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from prl_lightning.functional import pass_at_k

from .batches import quick


def exact(n: int, c: int, k: int) -> float:
    return float(1 - Fraction(comb(n - c, k), comb(n, k)))


def test_is_the_share_of_draws_that_hold_a_correct_one() -> None:
    for n in range(1, 7):
        for c in range(n + 1):
            for k in range(1, n + 1):
                draws = list(combinations(range(n), k))  # samples 0 to c - 1 are the correct ones
                want = sum(draw[0] < c for draw in draws) / len(draws)
                assert pass_at_k(n, c, k).item() == pytest.approx(want, rel=1e-14, abs=0)


@quick
@given(
    st.integers(1, 400).flatmap(
        lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))
    )
)
@example((10_000, 1, 9_999))
@example((10_000, 5_000, 16))
@example((10_000, 37, 512))
@example((10_000, 10_000, 10_000))
@example((10_000, 0, 10_000))
@example((1_000_000, 2, 3))
def test_is_the_formula_in_exact_integers(case: tuple[int, int, int]) -> None:
    assert pass_at_k(*case).item() == pytest.approx(exact(*case), rel=1e-12, abs=0)


def test_literals() -> None:
    got = pass_at_k(4, torch.tensor([0, 1, 2, 3, 4]), 2)
    assert got.dtype == torch.float64
    assert got.tolist() == pytest.approx([0, 1 / 2, 5 / 6, 1, 1], rel=1e-15)
    assert str(got[0].item()) == "0.0"  # not -0.0


def test_broadcasts_all_three() -> None:
    n = torch.tensor([4, 8])[:, None, None]
    c = torch.tensor([0, 1, 3])[None, :, None]
    got = pass_at_k(n, c, torch.tensor([1, 2, 4]))
    want = [[[exact(i, j, m) for m in (1, 2, 4)] for j in (0, 1, 3)] for i in (4, 8)]
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64))


def test_counts_may_be_floats_and_may_be_none() -> None:
    assert pass_at_k(torch.tensor([4.0]), torch.tensor([1.0]), 2).item() == pytest.approx(0.5)
    assert pass_at_k(4, torch.zeros(0), 2).tolist() == []


@pytest.mark.parametrize(
    ("c", "k", "message"),
    [
        (2, 5, "k=5: outside 1 to num_samples=4"),
        (2, 0, "k=0: outside 1"),
        (5, 2, "num_correct=5: outside 0 to num_samples=4"),
        (-1, 2, "num_correct=-1"),
    ],
)
def test_errors(c: int, k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pass_at_k(4, torch.tensor([1, c]), k)
