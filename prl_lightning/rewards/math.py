r"""Mathematical answers: the last boxed one of a completion, checked by math-verify.

As in the papers' experiments, the reference answer is put in a box and both boxes go to math-verify
(https://github.com/huggingface/Math-Verify). Stricter than its defaults: an answer outside a box is
not looked for, so a completion without a `\boxed{...}` that closes scores 0.
"""

import logging
import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

from prl_lightning.rewards.match import number_answers, reference_texts
from prl_lightning.rewards.protocol import completion_text

_BOX = re.compile(r"\\f?box(?:ed)?\s*\{")
_BRACE = re.compile(r"\\[{}\\]|[{}]")  # \{ is text and closes nothing

# Between boxes that are one answer: "\boxed{1}$ and $\boxed{2}", "x=\boxed{1}, x=\boxed{2}".
_BETWEEN_BOXES = re.compile(
    r"[\s$\\()]*(?:[,;]|(?:\\text\s*\{)?\s*(?:and|or)\s*\}?)[\s$\\()]*(?:\w\s*=\s*)?"
)

# math-verify's own time limits are SIGALRM: they only work in a process's main thread and cancel
# other alarms. They are off, so what is known to take it minutes is refused up front. The longest
# of the 1,517 reference answers of the papers' evaluation sets has 210 characters and 4 levels.
_MAX_CHARACTERS = 400
_MAX_NESTING = 10
_UNREASONABLE = re.compile(
    r"\\(?:i*int|oint|sum|prod|lim)(?![a-z])"  # not carried out, so not an answer yet
    r"|\d\s*\^\s*\{?\s*\d+\s*\^\s*\{?\s*\d"  # a tower of powers of numbers
    r"|\^\s*\{?\s*-?\d{7}|\d{6}\s*!"  # millions of digits
)

# Both from Minerva Math. 58 of its 272 reference answers are like "4.5e33", in which math-verify
# reads Euler's number, so that 4.5 \times 10^{33} is wrong to it (as "2e-1" may mean either, both
# readings count). A few are like "-1./3", which it cannot read.
_SCIENTIFIC = re.compile(r"(?<![\w.\\])(\d+\.?\d*|\.\d+)[eE]([+-]?\d+)(?!\w)")
_FULL_STOP = re.compile(r"(?<=\d)\.(?=\s*[-+*/^)]|\s*$)|(?<=\$)\.\s*$")

_TYPICAL = (
    "12",
    "-3.5",
    r"\frac{1}{2}",
    r"\frac{\pi \cdot 4}{6}",
    r"2\sqrt{3}",
    r"(1, 2]",
    r"\{1, 2, 5\}",
    "(3, -4, 5)",
    "x^2 + 5x - 2 = 0",
    "y = 3(x + 1)",
    r"10^{3} \text{ cm}",
    r"(-\infty, 2) \cup (3, \infty)",
    r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}",
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
        self.failures = 0
        pairs = zip(completions, given[0], strict=True)
        return [self._reward(completion_text(text), reference) for text, reference in pairs]

    def warm_up(self) -> None:
        """Import math-verify and sympy and let them build their tables: seconds, once."""
        for left, right in pairwise(_TYPICAL):
            _is_same(left, right)

    def answers(self, completions: Sequence[str]) -> list[int]:
        """Number the boxed answers of one prompt's completions: equal to math-verify is equal.

        What math-verify cannot compare is the same only where its text is.
        """
        return number_answers([_tidy(boxed_answer(text) or "") for text in completions], _is_same)

    def _reward(self, completion: str, reference: Any) -> float | None:
        if reference is None:
            return None
        golds = [boxed_answer(text) or _marked(text) for text in reference_texts(reference)]
        answer = boxed_answer(completion)
        if not answer:
            return 0.0
        if any(_tidy(answer) == _tidy(gold) for gold in golds):
            return 1.0
        failed = False
        for gold in golds:
            try:
                if _equal(gold, answer):
                    return 1.0
            except Exception:  # sympy raises nearly everything; what matters is that it is counted
                failed = True
        self.failures += failed
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


def _tidy(answer: str) -> str:
    """An answer's text without what changes only its looks."""
    answer = re.sub(r"\\left\b|\\right\b|\\[,;:!]|\\ |[\s$]", "", answer)
    return re.sub(r"\\[dt]frac\b", r"\\frac", answer)


def _equal(gold: str, answer: str) -> bool:
    for text in (gold, answer):
        if _is_unreasonable(text):
            raise ValueError(f"not given to math-verify: {text[:80]!r}")
    from math_verify import verify

    left, right = _parse(gold), _parse(answer)
    same = verify(list(left), list(right), timeout_seconds=None, raise_on_error=True)
    return bool(same) and not _differs_in_scale(left, right)


def _is_same(first: str, answer: str) -> bool:
    """Equality of two completions' answers, neither of which is the reference."""
    try:
        return _equal(first, answer)
    except Exception:  # counted where the completions are rewarded
        return False


def _is_unreasonable(answer: str) -> bool:
    depth = deepest = 0
    for bracket in re.finditer(r"[{(\[]|[})\]]", answer):
        depth += 1 if bracket[0] in "{([" else -1
        deepest = max(deepest, depth)
    return (
        len(answer) > _MAX_CHARACTERS
        or deepest > _MAX_NESTING
        or _UNREASONABLE.search(answer) is not None
    )


# The completions of a group share their reference answer and often their own.
@lru_cache(maxsize=4096)
def _parse(answer: str) -> tuple[Any, ...]:
    """math-verify's readings of an answer: an expression where there is one, and its text."""
    from math_verify import LatexExtractionConfig, parse

    _silence_time_limit_warning()
    readings = parse(
        rf"\boxed{{{_FULL_STOP.sub('', answer)}}}",
        [LatexExtractionConfig(try_extract_without_anchor=False, boxed_match_priority=0)],
        extraction_mode="first_match",  # the box or nothing: never a fraction somewhere inside it
        parsing_timeout=None,
        raise_on_error=True,
    )
    if _SCIENTIFIC.search(answer):
        readings += _parse(_SCIENTIFIC.sub(r"\1\\times 10^{\2}", answer))
    elif "=" in answer and all(isinstance(reading, str) for reading in readings):
        # A left side that cannot be read, as in "m_{\max} = 3": what it equals often can.
        readings += _parse(answer.rsplit("=", 1)[1])
    return tuple(readings)


def _differs_in_scale(gold: tuple[Any, ...], answer: tuple[Any, ...]) -> bool:
    """Whether no two readings as numbers agree to 1e-4 of their size, for a small reference.

    math-verify compares decimals to six places, so that 3e-8 and 5e-9 are one number to it.
    """
    golds, answers = _values(gold), _values(answer)
    if not any(0 < abs(value) < 1e-2 for value in golds) or not answers:
        return False
    return not any(abs(left - right) <= 1e-4 * abs(left) for left in golds for right in answers)


def _values(readings: tuple[Any, ...]) -> list[complex]:
    numbers = (reading for reading in readings if getattr(reading, "is_number", False))
    return [complex(number.doit().evalf()) for number in numbers]


@lru_cache(maxsize=1)
def _silence_time_limit_warning() -> None:
    """math-verify warns that its time limits are off, which is meant (see _UNREASONABLE)."""
    for name in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(name).addFilter(
            lambda record: "Timeout is disabled" not in record.getMessage()
        )
