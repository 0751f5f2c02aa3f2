"""Majority votes against an enumeration of who wins."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prl_lightning.functional import majority_correct

VOTES = st.lists(st.tuples(st.integers(-1, 3), st.booleans()), min_size=1, max_size=9)


def by_counting(votes: list[tuple[int, bool]]) -> Fraction:
    """Draw one of the most frequent answers by lot, then one of its samples."""
    counts = Counter(answer for answer, _ in votes if answer >= 0)
    winners = [answer for answer, count in counts.items() if count == max(counts.values())]
    worth = Fraction(0)
    for winner in winners:
        right = [correct for answer, correct in votes if answer == winner]
        worth += Fraction(sum(right), len(right)) / len(winners)
    return worth


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 9).flatmap(lambda n: st.lists(VOTES.map(lambda v: (v * n)[:n]), min_size=1)))
def test_a_vote_is_what_counting_gives(problems: list[list[tuple[int, bool]]]) -> None:
    answers, correct = torch.tensor(problems).unbind(-1)
    expected = torch.tensor([float(by_counting(votes)) for votes in problems])
    torch.testing.assert_close(majority_correct(answers, correct.bool()), expected.double())


def test_one_sample_is_its_own_majority() -> None:
    answers, correct = torch.tensor([[5], [0], [-1]]), torch.tensor([[True], [False], [False]])
    assert majority_correct(answers, correct).tolist() == [1, 0, 0]


def test_shapes_that_differ_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"answers has shape \(2, 3\).*\(2, 4\)"):
        majority_correct(torch.zeros(2, 3), torch.zeros(2, 4, dtype=torch.bool))
