"""Score answers with the verifiers of reasoning-gym's tasks."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from prl_lightning.rewards.match import RegexMatch, number_answers, same_text
from prl_lightning.rewards.math import boxed_answer
from prl_lightning.rewards.protocol import completion_text

# Tasks whose verifier runs the answer as Python: with eval(), or with sympy's parse_expr(), which
# calls eval(). An answer could read files or start programs. This was found by reading and by an
# audit hook for reasoning-gym 0.1.25, which the extra `gym` therefore fixes.
EVALUATING = frozenset({
    "binary_matrix", "countdown", "intermediate_integration", "n_queens",
    "polynomial_multiplication", "puzzle24", "simple_integration", "spiral_matrix",
    "string_insertion",
})  # fmt: skip

_TAG = re.compile(r"<(?P<end>/?)answer\s*>", re.IGNORECASE)


class ReasoningGymReward:
    r"""Reward the score of the task's own verifier, from 0 to 1.

    The answer is the text between the last `<answer>` and its `</answer>`, or else the last box; a
    box within the tags is opened. For models that follow neither form, a pattern finds the answer.
    A completion without an answer scores 0. Many verifiers give a part of the score for a wrong
    answer in the right form, or for a part of the answer.

    The rows are those of `prl_lightning.data.ReasoningGym`.

    Args:
        threshold: If given, scores from it on count as 1.0, and scores below it as 0.0.
        evaluates_answers: Allow tasks whose verifier runs the answer as Python code.
        pattern: Regular expression whose last match has the answer, instead of tags and boxes.
        group: Number or name of the pattern's group that is the answer; 0 is the whole match.

    Attributes:
        failures: How many completions of the last call the verifier raised on, although it accepts
            the task's own answer. They score 0.

    Raises:
        ValueError: The threshold is not above 0 and at most 1, or the pattern is not one.
    """

    def __init__(
        self,
        threshold: float | None = None,
        evaluates_answers: bool = False,
        pattern: str | None = None,
        group: int | str = 1,
    ) -> None:
        if threshold is not None and not 0 < threshold <= 1:
            raise ValueError(
                f"ReasoningGymReward: threshold={threshold}: must be above 0 and at most 1."
            )
        self.threshold = threshold
        self.evaluates_answers = evaluates_answers
        self.failures = 0
        self._given_answer: Callable[[str], str | None] = (
            given_answer if pattern is None else RegexMatch(pattern, group=group).given_answer
        )
        self._verifiers: dict[tuple[str, str], Callable[..., float]] = {}

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        task: Sequence[str],
        entry: Sequence[Mapping[str, Any]],
        config: Sequence[Mapping[str, Any]],
    ) -> list[float]:
        """Score each completion's answer.

        Args:
            prompts: B prompts; not used.
            completions: B completions, texts or chat messages.
            task: B names of tasks.
            entry: B entries as reasoning-gym made them.
            config: B configurations of the tasks.

        Returns:
            B rewards.

        Raises:
            ValueError: A task runs answers as code, and that is not allowed.
        """
        self.check_tasks(set(task))
        self.failures = 0
        rows = zip(map(completion_text, completions), task, entry, config, strict=True)
        return [self._reward(*row) for row in rows]

    def check_tasks(self, tasks: Collection[str]) -> None:
        """Refuse tasks that run answers as code, unless that is allowed.

        Args:
            tasks: Names of tasks.

        Raises:
            ValueError: There is such a task.
        """
        found = sorted(EVALUATING & set(tasks))
        if found and not self.evaluates_answers:
            raise ValueError(
                f"ReasoningGymReward: to score an answer, reasoning-gym runs it as Python code in "
                f"the tasks {found}, so a completion could read files or start programs. Leave "
                "them out, or set evaluates_answers=true where that does no harm."
            )

    def warm_up(self) -> None:
        """Import reasoning-gym; takes seconds, once."""
        import reasoning_gym  # noqa: F401

    def answers(self, completions: Sequence[str]) -> list[int]:
        """Number the answers of one prompt's completions; equal are equal texts and numbers."""
        return number_answers([self._given_answer(text) for text in completions], same_text)

    def _reward(
        self, completion: str, task: str, entry: Mapping[str, Any], config: Mapping[str, Any]
    ) -> float:
        answer = self._given_answer(completion)
        if answer is None:
            return 0.0
        score = self._verifier(task, config)
        try:
            value = float(score(answer, entry))
        except MemoryError:
            raise
        except Exception:  # as verifiers raise that expect a number or a list
            score(entry["answer"], entry)  # if this raises as well, it is the verifier's fault
            self.failures += 1
            return 0.0
        return value if self.threshold is None else float(value >= self.threshold)

    def _verifier(self, task: str, config: Mapping[str, Any]) -> Callable[..., float]:
        key = task, repr(sorted(config.items()))
        if key not in self._verifiers:  # some load word lists
            from reasoning_gym.factory import DATASETS

            of_task, of_config = DATASETS[task]
            self._verifiers[key] = of_task(of_config(**config, seed=0, size=1)).score_answer
        return self._verifiers[key]


def given_answer(text: str) -> str | None:
    r"""Return the answer that a completion gives.

    Args:
        text: The completion.

    Example:
        >>> given_answer("<answer>3</answer> No: <answer> 4 </answer>"), given_answer(r"\boxed{5}")
        ('4', '5')
    """
    tags = list(_TAG.finditer(text))
    for start, end in reversed(list(zip(tags, tags[1:], strict=False))):
        if end["end"] and not start["end"]:
            inner = text[start.end() : end.start()].strip()
            return boxed_answer(inner) or inner or None
    return boxed_answer(text) or None
