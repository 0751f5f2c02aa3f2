"""Comparing the answers inside a group, in the sandbox."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from prl_lightning.rewards import RewardSum
from rewards.orders import TIGHT, Whole, obey


class Stubborn(Whole):
    """All non-empty texts are equal answers. Only a comparison obeys what they say."""

    def answers(self, completions: Sequence[str]) -> list[int]:
        if "short" in completions:
            return [0]
        if len(completions) > 1:
            obey(completions)
        return [0 if text else -1 for text in completions]


@pytest.mark.process
@pytest.mark.parametrize(
    ("groups", "left_out", "numbers", "failures"),
    [
        # A group that cannot be compared: every answer is different.
        (
            [["a", "", "b"], ["raise", "", "b"]],
            (),
            [[0, -1, 0], [0, -1, 1]],
            {1: "no such thing"},
        ),
        ([["short", "b"], ["c"]], (), [[0, 1], [0]], {0: "returned [0] for 2 completions"}),
        # Completions that were left out do not hang the comparison of the others.
        (
            [["sleep", "a", "a", ""], ["a", "sleep", "sleep", "a"]],
            {(0, 0), (1, 1), (1, 2)},
            [[1, 0, 0, -1], [0, 1, 2, 0]],
            {},
        ),
    ],
)
def test_answers_of_groups(
    groups: Any, left_out: Any, numbers: list[list[int]], failures: dict[int, str]
) -> None:
    rewards = RewardSum([Stubborn()], limits=TIGHT)
    answers = rewards.answers(groups, left_out)
    rewards.stop()
    assert answers is not None
    assert answers.numbers == numbers
    assert answers.failures.keys() == failures.keys()
    assert all(words in answers.failures[group].message for group, words in failures.items())
