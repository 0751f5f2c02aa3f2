"""Compare the answers inside a group of completions, for a majority vote."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from prl_lightning.rewards.protocol import NO_ANSWER
from prl_lightning.rewards.sandbox.limits import Failure, Reply, RewardLimits, Task

Groups = Sequence[Sequence[str]]


@dataclass(frozen=True)
class GroupAnswers:
    """The answers of groups of completions.

    Attributes:
        numbers: For each group, one number per completion. Equal answers have equal numbers;
            completions without an answer have `NO_ANSWER`.
        failures: By index of the group, why its comparison failed. Each completion of such a group
            that has an answer gets a number that no other one has.
    """

    numbers: list[list[int]]
    failures: dict[int, Failure] = field(default_factory=dict)


def compare_here(function: Any, groups: Groups) -> GroupAnswers:
    """Compare each group's answers in this process.

    Args:
        function: A reward function with a method `answers`.
        groups: The completions of each prompt.
    """
    return GroupAnswers([function.answers(completions=list(texts)) for texts in groups])


def compare_in_sandbox(
    index: int,
    groups: Groups,
    left_out: Collection[tuple[int, int]],
    limits: RewardLimits,
    run: Callable[[Sequence[Task]], list[Reply]],
) -> GroupAnswers:
    """Compare each group's answers in workers.

    Args:
        index: Index of the reward function.
        groups: The completions of each prompt.
        left_out: See `RewardSum.answers`.
        limits: Limits of one completion.
        run: Runs tasks.
    """

    def replies(places: Sequence[tuple[int, Sequence[int]]]) -> list[Reply]:
        texts = [[groups[group][row] for row in rows] for group, rows in places]
        tasks = [
            Task(index, "answers", {"completions": some}, limits.seconds * len(some))
            for some in texts
        ]
        return [_checked(*pair) for pair in zip(run(tasks), map(len, texts), strict=True)]

    kept = [
        (group, [row for row in range(len(texts)) if (group, row) not in left_out])
        for group, texts in enumerate(groups)
    ]
    kept = [(group, rows) for group, rows in kept if rows]
    numbers: list[dict[int, int]] = [{} for _ in groups]
    failures: dict[int, Failure] = {}
    for (group, rows), reply in zip(kept, replies(kept), strict=True):
        if reply.failure:
            failures[group] = reply.failure
        else:
            numbers[group] = dict(zip(rows, reply.values, strict=True))

    # The others are not compared, only checked for an answer: each call gets one completion.
    alone = [
        (group, [row])
        for group, texts in enumerate(groups)
        for row in range(len(texts))
        if row not in numbers[group]
    ]
    for (group, (row,)), reply in zip(alone, replies(alone), strict=True):
        unused = max([NO_ANSWER, *numbers[group].values()]) + 1
        has_none = not reply.failure and reply.values == [NO_ANSWER]
        numbers[group][row] = NO_ANSWER if has_none else unused
    return GroupAnswers([[row[place] for place in sorted(row)] for row in numbers], failures)


def _checked(reply: Reply, size: int) -> Reply:
    if reply.failure or (isinstance(reply.values, list) and len(reply.values) == size):
        return reply
    words = f"answers() returned {reply.values!r:.100} for {size} completions"
    return Reply(failure=Failure("ValueError", words))
