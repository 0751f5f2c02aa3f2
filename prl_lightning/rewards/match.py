"""Rewards that compare texts: the whole completion, or what a pattern finds in it."""

import math
import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from numbers import Integral, Real
from typing import Any

from prl_lightning.rewards.protocol import NO_ANSWER, completion_text

_NUMERAL = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)")


def reference_texts(reference: Any) -> list[str]:
    """Convert a dataset's reference answer to texts.

    Args:
        reference: A text, a number (27.0 becomes "27"), or a list of alternatives.

    Returns:
        The alternatives as stripped texts.

    Raises:
        ValueError: The reference is none of these, or it is empty.

    Example:
        >>> reference_texts(27.0), reference_texts(["1/2", 0.5])
        (['27'], ['1/2', '0.5'])
    """
    if isinstance(reference, bool):
        pass  # an int in Python, but not an answer that a completion would give
    elif isinstance(reference, list | tuple):
        texts = [text for item in reference for text in reference_texts(item)]
        if texts:
            return texts
    elif isinstance(reference, str):
        if reference.strip():
            return [reference.strip()]
    elif isinstance(reference, Integral):
        return [str(int(reference))]
    elif isinstance(reference, Real | Decimal) and math.isfinite(reference):
        exact = reference if isinstance(reference, Decimal) else Decimal(repr(float(reference)))
        # In digits: most parsers of answers do not read "1e-07" as a number.
        whole, _, fraction = format(exact, "f").partition(".")
        return [f"{whole}.{fraction.rstrip('0')}".removesuffix(".")]
    raise ValueError(
        f"reference answer {reference!r}: must be a text, a number or a list of them, and not "
        "empty. Filter out such rows, or use None if the reward does not apply to them"
    )


def same_text(left: str, right: str) -> bool:
    """Check whether two texts are equal: as stripped texts, or as plain decimal numbers.

    "27" equals "27.0", "033" equals "33", and "yes" equals " yes ". "1,000" and "1/2" are not plain
    decimal numbers, so they do not equal "1000" and "0.5".

    Args:
        left: A text.
        right: Another text.

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
    """Number the distinct answers of a group in order of appearance.

    Args:
        answers: Texts; `None` or an empty text means "no answer".
        are_same: Compares two texts. Each answer is compared only with the first one of every
            number, so two answers may share a number without being compared with each other.

    Returns:
        One number per answer, `NO_ANSWER` where there is none.

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
    """Reward 1.0 if the whole completion equals the reference answer (`same_text`), else 0.0.

    Args:
        column: Dataset column of the reference answers. If a row has `None`, its reward is `None`.

    Example:
        >>> ExactMatch()(["1 + 1?", "2 + 2?"], [" 2", "It is 4"], answer=["2", "4"])
        [1.0, 0.0]
    """

    def __init__(self, column: str = "answer") -> None:
        self.column = column

    @property
    def columns(self) -> tuple[str, ...]:
        """The dataset columns that this reward needs."""
        return (self.column,)

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Sequence[Any]
    ) -> list[float | None]:
        """Compare each completion with its reference answer.

        Args:
            prompts: B prompts; not used.
            completions: B completions, texts or chat messages.
            **columns: B values each; the column named `column` has the reference answers.

        Returns:
            B rewards.

        Raises:
            ValueError: The column is missing or has another length, or an answer is empty.
        """
        if self.column not in columns:
            raise ValueError(
                f"{type(self).__name__} reads the column '{self.column}', but was called with "
                f"{sorted(columns)}: pass that column, or name another one with column"
            )
        pairs = zip(completions, columns[self.column], strict=True)
        return [self._reward(completion_text(text), reference) for text, reference in pairs]

    def answers(self, completions: Sequence[str]) -> list[int]:
        """Number the answers of one prompt's completions; see `RewardSum.answers`."""
        return number_answers([self.given_answer(text) for text in completions], same_text)

    def _reward(self, completion: str, reference: Any) -> float | None:
        if reference is None:
            return None
        answer = self.given_answer(completion)
        if answer is None:
            return 0.0
        wanted = map(self._wanted, reference_texts(reference))
        return float(any(same_text(answer, text) for text in wanted))

    def _wanted(self, reference: str) -> str:
        return reference

    def given_answer(self, completion: str) -> str | None:
        """Return the answer that a completion gives, or None."""
        return completion


class RegexMatch(ExactMatch):
    r"""Reward 1.0 if the pattern's last match equals the reference answer, else 0.0.

    The pattern is also applied to a reference answer that is not a number, as GSM8K's column has
    the whole solution ("... #### 18"). Without a match there, the whole text is the answer.

    Args:
        pattern: Regular expression, in Python's syntax.
        column: Dataset column of the reference answers. If a row has `None`, its reward is `None`.
        group: Number or name of the pattern's group that contains the answer.

    Raises:
        ValueError: The pattern is not a regular expression, or it has no such group.

    Example:
        >>> reward = RegexMatch(r"#### *(\S+)")
        >>> reward(["1 + 1?"], ["First #### 3. No: #### 2"], answer=[2.0])
        [1.0]
        >>> reward(["1 + 1?"], ["#### 2"], answer=["1 and 1 is 2. #### 2"])
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

    def _wanted(self, reference: str) -> str:
        if _NUMERAL.fullmatch(reference):
            return reference
        return self.given_answer(reference) or reference

    def given_answer(self, completion: str) -> str | None:
        """Return what the pattern's last match in a completion contains, or None."""
        answer = None
        for match in self.pattern.finditer(completion):
            answer = match[self.group]
        return answer
