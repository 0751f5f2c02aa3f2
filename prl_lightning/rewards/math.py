r"""Mathematical answers: the last boxed one of a completion, checked by math-verify.

As in the papers' experiments, the reference answer is put in a box and both boxes go to math-verify
(https://github.com/huggingface/Math-Verify). Stricter than its defaults: an answer outside a box is
not looked for, so a completion without a `\boxed{...}` that closes scores 0.
"""

import re
from collections.abc import Sequence
from typing import Any

from prl_lightning.rewards.equality import UnreasonableError, is_equal, is_same, tidy, warm_up
from prl_lightning.rewards.match import number_answers, reference_texts
from prl_lightning.rewards.protocol import completion_text

_BOX = re.compile(r"\\f?box(?:ed)?\s*\{")
_BRACE = re.compile(r"\\[{}\\]|[{}]")  # \{ is text and closes nothing

# Between boxes that are one answer: "\boxed{1}$ and $\boxed{2}", "x=\boxed{1}, x=\boxed{2}".
_BETWEEN_BOXES = re.compile(
    r"[\s$\\()]*(?:[,;]|(?:\\text\s*\{)?\s*(?:and|or)\s*\}?)[\s$\\()]*(?:\w\s*=\s*)?"
)


class MathReward:
    r"""1.0 where the completion's last boxed answer equals the reference answer, else 0.0.

    The reference answers come from the first of the columns `answer`, `ground_truth` (verl) and
    `solution` (TRL) that is there. One is a text (put in a box; if it holds a box, as a worked
    solution does, that box counts, and otherwise what follows GSM8K's `####`), a number (27.0 is
    27) or a list, any one of which is right; `None` makes the reward `None`. Several boxes joined
    by commas, "and" or "or" are one answer.

    Attributes:
        failures: How many completions of the last call could not be judged: math-verify raised, or
            an answer was so large that it was not asked. They score 0.
        errors: What math-verify raised for them; see `RewardSum`. An answer that is too large is
            the completion's fault, and none.

    Example:
        >>> reward = MathReward()
        >>> reward(["?", "?"], [r"\boxed{\frac{2}{4}}", "It is 1/2"], answer=["0.5", "0.5"])
        [1.0, 0.0]
        >>> reward.failures
        0
    """

    columns = (("answer", "ground_truth", "solution"),)

    def __init__(self) -> None:
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
            prompts: B prompts; not looked at.
            completions: B completions, texts or chat messages.
            answer: B reference answers.
            ground_truth: B reference answers, looked at if `answer` is not given.
            solution: B reference answers, looked at if neither is given.
            **columns: Other columns; not looked at.

        Returns:
            B rewards.

        Raises:
            ValueError: If no reference answers are given, their number differs, or one is empty.
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
        """Import math-verify and sympy and let them build their tables: seconds, once.

        Raises:
            RuntimeError: If math-verify does not find equal what is equal.
        """
        warm_up()

    def answers(self, completions: Sequence[str]) -> list[int]:
        """Number the boxed answers of one prompt's completions: equal to math-verify is equal.

        What math-verify cannot compare is the same only where its text is.
        """
        return number_answers([tidy(boxed_answer(text) or "") for text in completions], is_same)

    def _reward(self, completion: str, reference: Any) -> float | None:
        if reference is None:
            return None
        golds = [boxed_answer(text) or _marked(text) for text in reference_texts(reference)]
        answer = boxed_answer(completion)
        if not answer:
            return 0.0
        if any(tidy(answer) == tidy(gold) for gold in golds):
            return 1.0
        errors: list[Exception] = []
        for gold in golds:
            try:
                if is_equal(gold, answer):
                    return 1.0
            except MemoryError:  # no property of the answer alone
                raise
            except Exception as error:  # sympy raises nearly everything
                errors.append(error)
        self.failures += bool(errors)
        self.errors += [error for error in errors if not isinstance(error, UnreasonableError)][:1]
        return 0.0


def boxed_answer(text: str) -> str | None:
    r"""What the last closed `\boxed{...}` (or `\fbox{...}`) of a text holds.

    Args:
        text: A completion, or a worked solution.

    Returns:
        Its content, stripped; of several last boxes joined by commas, semicolons, "and" or "or",
        the contents joined by commas; `None` if no box is closed.

    Example:
        >>> boxed_answer(r"Not \boxed{1}. So $x=\boxed{\frac{1}{2}}$ or $x=\boxed{3}$.")
        '\\frac{1}{2}, 3'
    """
    answers: list[str] = []
    next_start = None
    closings = _closing_braces(text)
    for opening in reversed(list(_BOX.finditer(text))):
        end = closings.get(opening.end() - 1)
        if end is None:
            continue
        if next_start is not None and not _BETWEEN_BOXES.fullmatch(text, end + 1, next_start):
            break
        answers.insert(0, text[opening.end() : end].strip())
        next_start = opening.start()
    return ", ".join(dict.fromkeys(answers)) if answers else None


def _marked(reference: str) -> str:
    """A reference answer without the worked solution before it, as GSM8K has it."""
    return reference.rpartition("####")[2].strip() or reference


def _closing_braces(text: str) -> dict[int, int]:
    """Where each brace that is opened is closed, if it is; in one pass, whatever the text is."""
    closings, opened = {}, []
    for brace in _BRACE.finditer(text):
        if brace[0] == "{":
            opened.append(brace.start())
        elif brace[0] == "}" and opened:
            closings[opened.pop()] = brace.start()
    return closings
