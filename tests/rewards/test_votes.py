"""Which completions of a prompt have the same answer, asked in processes that can be killed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prl_lightning.rewards import RewardSum
from prl_lightning.rewards.votes import GroupAnswers
from rewards.orders import TIGHT, Whole, obey


def test_a_wrong_number_of_answers_is_a_failure() -> None:
    class Short:
        def __call__(self, completions: Sequence[str], **columns: Any) -> list[float]:
            return [0.0 for _ in completions]

        def answers(self, completions: Sequence[str]) -> list[int]:
            return [0]

    answers = compared(Short(), [["a", "b"], ["c"]])
    assert answers.numbers == [[0, 1], [0]]
    assert "answers() returned [0] for 2 completions" in answers.failures[0].message


class Stubborn(Whole):
    """A letter is an answer, and no two are compared beside what it is told to do."""

    def answers(self, completions: Sequence[str]) -> list[int]:
        if len(completions) > 1:
            obey(completions)
        return [0 if text else -1 for text in completions]


def compared(function: Any, groups: Any, left_out: Any = (), limits: Any = TIGHT) -> GroupAnswers:
    rewards = RewardSum([function], limits=limits)
    answers = rewards.answers(groups, left_out)
    rewards.stop()
    assert answers is not None
    return answers


def test_answers_that_cannot_be_compared_are_all_different_where_there_are_some() -> None:
    answers = compared(Stubborn(), [["a", "", "b"], ["raise", "", "b"]])
    assert answers.numbers == [[0, -1, 0], [0, -1, 1]]
    assert {group: failure.kind for group, failure in answers.failures.items()} == {1: "KeyError"}


def test_what_could_not_be_judged_does_not_spoil_its_group() -> None:
    """A majority of two against answers of their own, whatever would hang in comparing them."""
    groups = [["sleep", "a", "a", ""], ["a", "sleep", "sleep", "a"]]
    answers = compared(Stubborn(), groups, {(0, 0), (1, 1), (1, 2)})
    assert answers.numbers == [[1, 0, 0, -1], [0, 1, 2, 0]]
    assert answers.failures == {}
