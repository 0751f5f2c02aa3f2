"""Rewards by comparing texts: all of a completion, or what a pattern finds in it."""

import math
import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from numbers import Integral, Real
from typing import Any

from prl_lightning.rewards.protocol import NO_ANSWER, completion_text

_NUMERAL = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)")


def reference_texts(reference: Any) -> list[str]:
    """The texts by which a dataset's reference answer may be given.

    Args:
        reference: A text, a number (27.0 is "27"), or a list of them, any one of which is right.

    Returns:
        Those texts, stripped.

    Raises:
        ValueError: If it is none of these, or holds no text at all.

    Example:
        >>> reference_texts(27.0), reference_texts(["1/2", 0.5])
        (['27'], ['1/2', '0.5'])
    """
    if isinstance(reference, bool):
        pass  # an integer to Python, but no answer that a completion would give
    elif isinstance(reference, list | tuple):
        texts = [text for item in reference for text in reference_texts(item)]
        if texts:
            return texts
    elif isinstance(reference, str):
        if reference.strip():
            return [reference.strip()]
    elif isinstance(reference, Integral):
        return [str(int(reference))]
    elif isinstance(reference, Real) and math.isfinite(reference):
        # In digits, since "1e-07" is no number to most readers of answers.
        digits = format(Decimal(repr(float(reference))), "f")
        return [digits.removesuffix(".0")]
    raise ValueError(
        f"a reference answer is a text, a number or a list of them, and not empty; got "
        f"{reference!r}: filter out such rows, or use None for 'this reward does not apply'"
    )


def same_text(left: str, right: str) -> bool:
    """Whether two texts agree: equal when stripped, or both numerals of the same value.

    Args:
        left: One text.
        right: The other.

    Returns:
        True for "27" and "27.0", for "033" and "33", for "yes" and " yes "; False for "1,000" and
        "1000" or "1/2" and "0.5", which are not both plain numerals.

    Example:
        >>> same_text("27.0", "27"), same_text("27 m", "27")
        (True, False)
    """
    left, right = left.strip(), right.strip()
    if left == right:
        return True
    numerals = _NUMERAL.fullmatch(left) and _NUMERAL.fullmatch(right)
    return bool(numerals) and Decimal(left) == Decimal(right)


def number_answers(
    answers: Sequence[str | None], are_same: Callable[[str, str], bool]
) -> list[int]:
    """Number the different answers of a group in the order in which they appear.

    Args:
        answers: Texts; `None` or an empty one is no answer.
        are_same: Whether two texts are one answer. Each is compared with the first of every number,
            so that a relation that is not transitive cannot join what no comparison has joined.

    Returns:
        Their numbers, `NO_ANSWER` where there is none.

    Example:
        >>> number_answers(["4", None, "5", "4.0"], same_text)
        [0, -1, 1, 0]
    """
    firsts: list[str] = []
    known: dict[str | None, int] = {None: NO_ANSWER, "": NO_ANSWER}
    for answer in answers:
        if answer is None or answer in known:
            continue
        same = (number for number, first in enumerate(firsts) if are_same(first, answer))
        known[answer] = next(same, len(firsts))
        if known[answer] == len(firsts):
            firsts.append(answer)
    return [known[answer] for answer in answers]


class ExactMatch:
    """1.0 where the whole completion is the reference answer (`same_text`), else 0.0.

    Args:
        column: Dataset column of the reference answers; a row's `None` gives `None`.

    Example:
        >>> ExactMatch()(["1 + 1?", "2 + 2?"], [" 2", "It is 4"], answer=["2", "4"])
        [1.0, 0.0]
    """

    def __init__(self, column: str = "answer") -> None:
        self.column = column

    @property
    def columns(self) -> tuple[str, ...]:
        """The dataset columns that the reward reads."""
        return (self.column,)

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Sequence[Any]
    ) -> list[float | None]:
        """Compare each completion with its reference answer.

        Args:
            prompts: B prompts; not looked at.
            completions: B completions, texts or chat messages.
            **columns: B values each; the one named `column` holds the reference answers.

        Returns:
            B rewards.

        Raises:
            ValueError: If the column is missing or has another length, or an answer is empty.
        """
        if self.column not in columns:
            raise ValueError(
                f"{type(self).__name__} reads the column '{self.column}', but was called with "
                f"{sorted(columns)}: pass that column, or name another one with column"
            )
        pairs = zip(completions, columns[self.column], strict=True)
        return [self._reward(completion_text(text), reference) for text, reference in pairs]

    def answers(self, completions: Sequence[str]) -> list[int]:
        """Number the answers of one prompt's completions, see `RewardSum.answers`."""
        return number_answers([self._answer(text) for text in completions], same_text)

    def _reward(self, completion: str, reference: Any) -> float | None:
        if reference is None:
            return None
        answer = self._answer(completion)
        if answer is None:
            return 0.0
        return float(any(same_text(answer, text) for text in reference_texts(reference)))

    def _answer(self, completion: str) -> str | None:
        return completion


class RegexMatch(ExactMatch):
    r"""1.0 where the pattern's last match in the completion is the reference answer, else 0.0.

    Args:
        pattern: Regular expression, in Python's syntax.
        column: Dataset column of the reference answers; a row's `None` gives `None`.
        group: The pattern's group, by number or name, that is the answer.

    Raises:
        ValueError: If the pattern is not a regular expression or has no such group.

    Example:
        >>> reward = RegexMatch(r"#### *(\S+)")
        >>> reward(["1 + 1?"], ["First #### 3. No: #### 2"], answer=[2.0])
        [1.0]
    """

    def __init__(self, pattern: str, column: str = "answer", group: int | str = 1) -> None:
        super().__init__(column)
        try:
            self.pattern = re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
        if group not in self.pattern.groupindex and group not in range(self.pattern.groups + 1):
            raise ValueError(
                f"the pattern {pattern!r} has no group {group!r}: put the answer in parentheses, "
                "or use group=0 for the whole match"
            )
        self.group = group

    def _answer(self, completion: str) -> str | None:
        answer = None
        for match in self.pattern.finditer(completion):
            answer = match[self.group]
        return answer
