"""Which completions of a prompt have the same answer: asked here, or in workers within limits."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from prl_lightning.rewards.protocol import NO_ANSWER
from prl_lightning.rewards.tasks import Failure, Reply, RewardLimits, Task

Groups = Sequence[Sequence[str]]


@dataclass(frozen=True)
class GroupAnswers:
    """The answers of groups of completions.

    Attributes:
        numbers: For each group, one a completion: the same for the same answer, `NO_ANSWER` where
            there is none.
        failures: Of groups that could not be compared, by their place: each completion that has an
            answer counts as having one of its own.
    """

    numbers: list[list[int]]
    failures: dict[int, Failure] = field(default_factory=dict)


def compare_here(function: Any, groups: Groups) -> GroupAnswers:
    """Ask a function about each group in this process.

    Args:
        function: With a method `answers`.
        groups: The texts of each prompt.
    """
    return GroupAnswers([function.answers(completions=list(texts)) for texts in groups])


def compare_in_workers(
    index: int,
    groups: Groups,
    left_out: Collection[tuple[int, int]],
    limits: RewardLimits,
    run: Callable[[Sequence[Task]], list[Reply]],
) -> GroupAnswers:
    """Ask a function about each group, and about each completion of those that it cannot compare.

    Args:
        index: Of the function, as the workers know it.
        groups: The texts of each prompt.
        left_out: See `RewardSum.answers`.
        limits: Of a completion.
        run: Carries tasks out.
    """

    def replies(some: Groups) -> list[Reply]:
        tasks = [
            Task(index, "answers", {"completions": list(texts)}, limits.seconds * len(texts))
            for texts in some
        ]
        pairs = zip(run(tasks), some, strict=True)
        return [_checked(reply, len(texts)) for reply, texts in pairs]

    together = [
        [place for place in range(len(texts)) if (group, place) not in left_out]
        for group, texts in enumerate(groups)
    ]
    asked = [group for group, places in enumerate(together) if places]
    found = replies([[groups[group][place] for place in together[group]] for group in asked])
    failures: dict[int, Failure] = {}
    numbers: list[dict[int, int]] = [{} for _ in groups]
    for group, reply in zip(asked, found, strict=True):
        if reply.failure:
            failures[group] = reply.failure
        else:
            numbers[group] = dict(zip(together[group], reply.values, strict=True))

    # Alone, a completion is compared with nothing: only whether it has an answer is looked for.
    alone = [(g, i) for g, texts in enumerate(groups) for i in range(len(texts))]
    alone = [(group, place) for group, place in alone if place not in numbers[group]]
    found = replies([[groups[group][place]] for group, place in alone])
    for (group, place), reply in zip(alone, found, strict=True):
        own = max(numbers[group].values(), default=NO_ANSWER) + 1
        has_none = not reply.failure and reply.values == [NO_ANSWER]
        numbers[group][place] = NO_ANSWER if has_none else max(0, own)
    return GroupAnswers([[row[place] for place in sorted(row)] for row in numbers], failures)


def _checked(reply: Reply, size: int) -> Reply:
    if reply.failure or (isinstance(reply.values, list) and len(reply.values) == size):
        return reply
    words = f"answers() returned {reply.values!r:.100} for {size} completions"
    return Reply(failure=Failure("ValueError", words))
