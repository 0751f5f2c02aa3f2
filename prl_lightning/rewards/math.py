r"""Compare a completion's last boxed answer with the reference answer, using math-verify.

As in the papers' experiments, the reference answer is put in a box, and math-verify compares both
boxes (https://github.com/huggingface/Math-Verify). This is stricter than its defaults: answers
outside a box do not count, so a completion without a closed `\boxed{...}` scores 0.
"""

import re
from collections.abc import Sequence
from typing import Any

from prl_lightning.rewards.equality import UnreasonableError, is_equal, is_same, warm_up
from prl_lightning.rewards.match import number_answers, reference_texts
from prl_lightning.rewards.normalize import tidy
from prl_lightning.rewards.protocol import completion_text

# LaTeX also takes the next sign without braces, as in \boxed 2.
_BOX = re.compile(
    r"\\(?:boxed|fbox)\s*(?:\{|(?P<bare>-?\d+(?:,\d{3})*(?:\.\d+)?(?:/\d+)?|[A-Za-z](?![A-Za-z])"
    r"|\\(?!f?box)[A-Za-z]+(?:\{[^{}]*\})*))"
)
_BRACE = re.compile(r"\\[{}\\]|[{}]")  # \{ is text, not a brace

# Between boxes that form one answer: "\boxed{1}$ and $\boxed{2}", "x=\boxed{1}, x=\boxed{2}".
_BETWEEN_BOXES = re.compile(
    r"[\s$\\()]*(?:[,;]|(?:\\text\s*\{)?\s*(?:and|or)\s*\}?)[\s$\\()]*(?:\w\s*=\s*)?"
)


class MathReward:
    r"""Reward 1.0 if the completion's last boxed answer equals the reference answer, else 0.0.

    The reference answers come from the first of the columns `answer`, `ground_truth` (verl) and
    `solution` (TRL) that exists. A reference answer is a text, a number (27.0 means 27) or a list
    of alternatives; `None` makes the reward `None`. If the text contains a box, as a worked
    solution does, that box counts. Otherwise what follows GSM8K's `####` counts, or else the whole
    text. Several boxes joined by commas, "and" or "or" form one answer.

    The last box of the whole completion counts, wherever it stands; an empty one is an answer, and
    wrong. With `reasoning_end="</think>"` only boxes after the last `</think>` count, and a
    completion without it scores 0. These are TRL's `accuracy_reward` and
    `reasoning_accuracy_reward`.

    Args:
        reasoning_end: The text that ends the reasoning.

    Attributes:
        failures: How many completions of the last call could not be judged, because math-verify
            raised or an answer was too complex for it. They score 0.
        errors: The exceptions that math-verify raised for them; see `RewardSum`. Answers that are
            too complex add none: they are the completion's fault.

    Example:
        >>> reward = MathReward()
        >>> reward(["?", "?"], [r"\boxed{\frac{2}{4}}", "It is 1/2"], answer=["0.5", "0.5"])
        [1.0, 0.0]
        >>> reward.failures
        0
    """

    columns = (("answer", "ground_truth", "solution"),)

    def __init__(self, reasoning_end: str | None = None) -> None:
        self.reasoning_end = reasoning_end
        self.failures = 0
        self.errors: list[Exception] = []

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        answer: Sequence[Any] | None = None,
        ground_truth: Sequence[Any] | None = None,
        solution: Sequence[Any] | None = None,
        **columns: Sequence[Any],
    ) -> list[float | None]:
        """Check each completion's boxed answer.

        Args:
            prompts: B prompts; not used.
            completions: B completions, texts or chat messages.
            answer: B reference answers.
            ground_truth: B reference answers, used if `answer` is not given.
            solution: B reference answers, used if neither is given.
            **columns: Other columns; not used.

        Returns:
            B rewards.

        Raises:
            ValueError: No reference answers are given, their number differs, or one is empty.
        """
        given = [column for column in (answer, ground_truth, solution) if column is not None]
        if not given:
            raise ValueError(
                "MathReward needs reference answers in one of the columns 'answer', 'ground_truth' "
                f"and 'solution', but was called with {sorted(columns)}"
            )
        self.failures, self.errors = 0, []
        pairs = zip(completions, given[0], strict=True)
        return [self._reward(completion_text(text), reference) for text, reference in pairs]

    def warm_up(self) -> None:
        """Import math-verify and sympy and build their tables; takes seconds, once.

        Raises:
            RuntimeError: math-verify finds equal answers different.
        """
        warm_up()

    def answers(self, completions: Sequence[str]) -> list[int]:
        """Number the boxed answers of one prompt's completions, compared by math-verify.

        Answers that math-verify cannot compare are equal only if their texts are.
        """
        return number_answers([tidy(self._answer(text) or "") for text in completions], is_same)

    def _answer(self, completion: str) -> str | None:
        if self.reasoning_end is None:
            return boxed_answer(completion)
        _, end, text = completion.rpartition(self.reasoning_end)
        return boxed_answer(text) if end else None

    def _reward(self, completion: str, reference: Any) -> float | None:
        if reference is None:
            return None
        golds = [boxed_answer(text) or _marked(text) for text in reference_texts(reference)]
        answer = self._answer(completion)
        if not answer:
            return 0.0
        if any(tidy(answer) == tidy(gold) for gold in golds):
            return 1.0
        errors: list[Exception] = []
        for gold in golds:
            try:
                if is_equal(gold, answer):
                    return 1.0
            except MemoryError:  # it does not depend on the answer alone
                raise
            except Exception as error:  # sympy raises nearly everything
                errors.append(error)
        self.failures += bool(errors)
        self.errors += [error for error in errors if not isinstance(error, UnreasonableError)][:1]
        return 0.0


def boxed_answer(text: str) -> str | None:
    r"""Return the content of the last closed `\boxed{...}` (or `\fbox{...}`) of a text.

    Args:
        text: A completion, or a worked solution.

    Returns:
        The content, stripped. If the last boxes are joined by commas, semicolons, "and" or "or",
        their contents are joined by commas. `None` if no box is closed.

    Example:
        >>> boxed_answer(r"Not \boxed{1}. So $x=\boxed{\frac{1}{2}}$ or $x=\boxed{3}$.")
        '\\frac{1}{2}, 3'
    """
    answers: list[str] = []
    next_start = None
    closings = _closing_braces(text)
    for opening in reversed(list(_BOX.finditer(text))):
        start, bare = opening.end(), opening["bare"]
        end = start if bare else closings.get(start - 1)
        if end is None:
            continue
        if next_start is not None and not _BETWEEN_BOXES.fullmatch(
            text, end + (not bare), next_start
        ):
            break
        answers.insert(0, bare or text[start:end].strip())
        next_start = opening.start()
    return ", ".join(dict.fromkeys(answers)) if answers else None


def _marked(reference: str) -> str:
    """Remove the worked solution in front of a reference answer, as in GSM8K."""
    return reference.rpartition("####")[2].strip() or reference


def _closing_braces(text: str) -> dict[int, int]:
    """Map each opening brace to its closing one, in one pass over any text."""
    closings, opened = {}, []
    for brace in _BRACE.finditer(text):
        if brace[0] == "{":
            opened.append(brace.start())
        elif brace[0] == "}" and opened:
            closings[opened.pop()] = brace.start()
    return closings
