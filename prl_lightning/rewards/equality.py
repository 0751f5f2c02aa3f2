"""Whether two mathematical answers are equal: math-verify, and what keeps it within its limits."""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from typing import Any

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

# Of every form that is usual: the tables of math-verify's parser and of sympy are built by use.
_EQUAL = (
    ("12", "12.0"),
    ("0.25", r"\frac{1}{4}"),
    (r"\frac{1}{2}", r"\frac{3}{6}"),
    (r"-\frac{7}{3}", r"\frac{-14}{6}"),
    (r"2\frac{1}{2}", "2.5"),
    (r"2\sqrt{3}", r"\sqrt{12}"),
    (r"\sqrt[3]{16}", r"2\sqrt[3]{2}"),
    (r"\frac{1+\sqrt{5}}{2}", r"\frac{\sqrt{5}}{2} + \frac{1}{2}"),
    (r"\frac{3}{\sqrt{3}}", r"\sqrt{3}"),
    (r"\frac{\pi}{2}", r"2\pi / 4"),
    (r"\frac{2\pi}{3} - \sqrt{3}", r"-\sqrt{3} + \pi \times \frac{2}{3}"),
    (r"2^{10}", "1024"),
    (r"3^{12} - 1", r"-1 + 9^{6}"),
    (r"\frac{5!}{3!}", "20"),
    (r"\binom{6}{2}", "15"),
    ("12,345", "12345"),
    (r"15\%", r"15 \%"),
    (r"60^\circ", "60"),
    (r"\$5.50", "5.5"),
    (r"3 \text{ cm}", "3"),
    (r"\text{Monday}", r"\text{ Monday }"),
    (r"\ln(2) + 1", r"1 + \ln 2"),
    (r"\log_{3}(8)", r"\frac{\log 8}{\log 3}"),
    (r"\log_{10}(7)", r"\frac{\ln 7}{\ln 10}"),
    (r"e^{2}", r"e \cdot e"),
    (r"\sin(2)", r"2\sin(1)\cos(1)"),
    (r"\tan\left(\frac{\pi}{5}\right)", r"\frac{\sin(\pi/5)}{\cos(\pi/5)}"),
    (r"|x - 2|", r"|2 - x|"),
    ("x^2 + 5x - 2", "5x + x^2 - 2"),
    ("(x + 2)(x - 3)", "x^2 - x - 6"),
    (r"\frac{x + 1}{x - 1}", r"(x + 1) \cdot (x - 1)^{-1}"),
    (r"\frac{n(n+1)}{2}", r"\frac{1}{2}n^2 + \frac{n}{2}"),
    (r"x^{n+1}", r"x \cdot x^{n}"),
    (r"2^{n} - 1", r"-1 + 2 \cdot 2^{n-1}"),
    (r"a_1 + b", r"b + a_1"),
    ("x = 5", "5"),
    ("2x + 3y = 6", "4x + 6y = 12"),
    ("x^2 + y^2 = 25", "25 = y^2 + x^2"),
    ("f(x) = x^2 + 1", "f(x) = 1 + x^2"),
    ("x = 1, y = 2", "x = 1.0, y = 2"),
    ("1, 2, 3", "3, 2, 1"),
    (r"1 \text{ and } 4", "1, 4"),
    (r"x < 3", r"3 > x"),
    (r"-2 \leq x \le 4", r"-2 \le x \leq 4.0"),
    ("(3, -4, 5)", r"(3.0, -4, \frac{10}{2})"),
    (r"\left(\frac{1}{2}, \sqrt{8}\right)", r"(0.5, 2\sqrt{2})"),
    ("(1, 2]", r"\left(1.0, 2\right]"),
    (r"[0, \infty)", r"\left[0.0, \infty\right)"),
    (r"(-\infty, 2) \cup (3, \infty)", r"(-\infty, 2.0) \cup (3, \infty)"),
    (r"\{1, 2, 5\}", r"\left\{5, 2, \frac{2}{2}\right\}"),
    (r"\{(1, 2), (3, 4)\}", r"\{(3.0, 4), (1, 2)\}"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 1.0 \\ 2 \end{pmatrix}"),
    (
        r"\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}",
        r"\begin{bmatrix} 1 & 2.0 \\ 3 & 4 \end{bmatrix}",
    ),
    (r"2.5 \times 10^{-3}", "0.0025"),
    (r"6.02 \times 10^{23}", r"6.02 \cdot 10^{23}"),
    (r"\frac{\sqrt{2} + \sqrt{6}}{4}", r"\frac{1}{4}(\sqrt{6} + \sqrt{2})"),
    (r"\frac{9\pi}{4} \text{ m}^2", r"\frac{18\pi}{8}"),
    (r"\pm 3", "3, -3"),
)


class UnreasonableError(ValueError):
    """An answer that would take math-verify minutes, and was not given to it."""


def warm_up() -> None:
    """Import math-verify and sympy and let them build their tables: seconds, once.

    Raises:
        RuntimeError: If math-verify does not find equal what is equal, as with a version that does
            not fit: every answer would score 0.
    """
    for left, right in _EQUAL:
        try:
            trouble = "" if is_equal(left, right) else "they differ to it"
        except ImportError:
            raise
        except Exception as error:
            trouble = f"{type(error).__name__}: {error}"
        if trouble:
            raise RuntimeError(
                f"math-verify does not find {left!r} and {right!r} equal ({trouble}), so that "
                "right answers would score 0: install the versions of math-verify and "
                "latex2sympy2_extended that this package asks for"
            )


def tidy(answer: str) -> str:
    """An answer's text without what changes only its looks."""
    answer = re.sub(r"\\left\b|\\right\b|\\[,;:!]|\\ |[\s$]", "", answer)
    return re.sub(r"\\[dt]frac\b", r"\\frac", answer)


def is_equal(gold: str, answer: str) -> bool:
    """Whether an answer is the reference answer, to math-verify.

    Args:
        gold: The reference answer, as it would stand in a box.
        answer: Another.

    Raises:
        UnreasonableError: If one of them would take math-verify minutes; it also raises whatever
            sympy raises.
    """
    for text in (gold, answer):
        if _is_unreasonable(text):
            raise UnreasonableError(f"not given to math-verify: {text[:80]!r}")
    from math_verify import verify

    left, right = _parse(gold), _parse(answer)
    same = verify(list(left), list(right), timeout_seconds=None, raise_on_error=True)
    return bool(same) and not _differs_in_scale(left, right)


def is_same(first: str, answer: str) -> bool:
    """Equality of two completions' answers, neither of which is the reference."""
    try:
        return is_equal(first, answer)
    except MemoryError:
        raise
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
