"""Compare two mathematical answers with math-verify, and refuse those that would take minutes."""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from typing import Any

# math-verify's own time limits use SIGALRM: they only work in the main thread and cancel other
# alarms. They are off here. Instead, answers that are known to take minutes are refused up front.
# The longest of the 1,517 reference answers of the papers' evaluation sets has 210 characters, and
# none has more than 4 levels of brackets.
_MAX_CHARACTERS = 400
_MAX_NESTING = 10
_UNREASONABLE = re.compile(
    r"\\(?:i*int|oint|sum|prod|lim)(?![a-z])"  # not evaluated, so not an answer yet
    r"|\d\s*\^\s*\{?\s*\d+\s*\^\s*\{?\s*\d"  # a tower of powers of numbers
    r"|\^\s*\{?\s*-?\d{7}|\d{6}\s*!"  # millions of digits
)

# Both are needed for Minerva Math. 58 of its 272 reference answers look like "4.5e33". math-verify
# reads the e as Euler's number, so 4.5 \times 10^{33} would be wrong. "2e-1" may mean either: both
# readings count. A few look like "-1./3", which math-verify cannot parse.
_SCIENTIFIC = re.compile(r"(?<![\w.\\])(\d+\.?\d*|\.\d+)[eE]([+-]?\d+)(?!\w)")
_FULL_STOP = re.compile(r"(?<=\d)\.(?=\s*[-+*/^)]|\s*$)|(?<=\$)\.\s*$")

# One pair of equal answers for each common form. math-verify's parser and sympy build their tables
# when a form is first used.
_EQUAL = r"""
12 == 12.0; 0.25 == \frac{1}{4}; \frac{1}{2} == \frac{3}{6}; -\frac{7}{3} == \frac{-14}{6};
2\frac{1}{2} == 2.5; 2\sqrt{3} == \sqrt{12}; \sqrt[3]{16} == 2\sqrt[3]{2};
\frac{1+\sqrt{5}}{2} == \frac{\sqrt{5}}{2} + \frac{1}{2}; \frac{3}{\sqrt{3}} == \sqrt{3};
\frac{\pi}{2} == 2\pi / 4; \frac{2\pi}{3} - \sqrt{3} == -\sqrt{3} + \pi \times \frac{2}{3};
2^{10} == 1024; 3^{12} - 1 == -1 + 9^{6}; \frac{5!}{3!} == 20; \binom{6}{2} == 15;
12,345 == 12345; 15\% == 15 \%; 60^\circ == 60; \$5.50 == 5.5; 3 \text{ cm} == 3;
\text{Monday} == \text{ Monday }; \ln(2) + 1 == 1 + \ln 2; \log_{3}(8) == \frac{\log 8}{\log 3};
\log_{10}(7) == \frac{\ln 7}{\ln 10}; e^{2} == e \cdot e; \sin(2) == 2\sin(1)\cos(1);
\tan\left(\frac{\pi}{5}\right) == \frac{\sin(\pi/5)}{\cos(\pi/5)}; |x - 2| == |2 - x|;
x^2 + 5x - 2 == 5x + x^2 - 2; (x + 2)(x - 3) == x^2 - x - 6;
\frac{x + 1}{x - 1} == (x + 1) \cdot (x - 1)^{-1};
\frac{n(n+1)}{2} == \frac{1}{2}n^2 + \frac{n}{2}; x^{n+1} == x \cdot x^{n};
2^{n} - 1 == -1 + 2 \cdot 2^{n-1}; a_1 + b == b + a_1; x = 5 == 5; 2x + 3y = 6 == 4x + 6y = 12;
x^2 + y^2 = 25 == 25 = y^2 + x^2; f(x) = x^2 + 1 == f(x) = 1 + x^2;
x = 1, y = 2 == x = 1.0, y = 2; 1, 2, 3 == 3, 2, 1; 1 \text{ and } 4 == 1, 4; x < 3 == 3 > x;
-2 \leq x \le 4 == -2 \le x \leq 4.0; (3, -4, 5) == (3.0, -4, \frac{10}{2});
\left(\frac{1}{2}, \sqrt{8}\right) == (0.5, 2\sqrt{2}); (1, 2] == \left(1.0, 2\right];
[0, \infty) == \left[0.0, \infty\right);
(-\infty, 2) \cup (3, \infty) == (-\infty, 2.0) \cup (3, \infty);
\{1, 2, 5\} == \left\{5, 2, \frac{2}{2}\right\}; \{(1, 2), (3, 4)\} == \{(3.0, 4), (1, 2)\};
\begin{pmatrix} 1 \\ 2 \end{pmatrix} == \begin{pmatrix} 1.0 \\ 2 \end{pmatrix};
\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix} == \begin{bmatrix} 1 & 2.0 \\ 3 & 4 \end{bmatrix};
2.5 \times 10^{-3} == 0.0025; 6.02 \times 10^{23} == 6.02 \cdot 10^{23};
\frac{\sqrt{2} + \sqrt{6}}{4} == \frac{1}{4}(\sqrt{6} + \sqrt{2});
\frac{9\pi}{4} \text{ m}^2 == \frac{18\pi}{8}; \pm 3 == 3, -3
"""


class UnreasonableError(ValueError):
    """The answer would take math-verify minutes, so it was not compared."""


def warm_up() -> None:
    """Import math-verify and sympy and build their tables; takes seconds, once.

    Raises:
        RuntimeError: math-verify finds equal answers different, as with an incompatible version.
            Every answer would score 0.
    """
    for pair in _EQUAL.split(";"):
        left, right = pair.strip().split(" == ")
        try:
            trouble = "" if is_equal(left, right) else "it finds them different"
        except ImportError:
            raise
        except Exception as error:
            trouble = f"{type(error).__name__}: {error}"
        if trouble:
            raise RuntimeError(
                f"math-verify does not find {left!r} and {right!r} equal ({trouble}), so correct "
                "answers would score 0: install the versions of math-verify and "
                "latex2sympy2_extended that this package requires"
            )


def tidy(answer: str) -> str:
    """Remove what only changes how an answer looks."""
    answer = re.sub(r"\\left\b|\\right\b|\\[,;:!]|\\ |[\s$]", "", answer)
    return re.sub(r"\\[dt]frac\b", r"\\frac", answer)


def is_equal(gold: str, answer: str) -> bool:
    """Check whether math-verify finds an answer equal to the reference answer.

    Args:
        gold: The reference answer, as it would be written in a box.
        answer: The other answer.

    Raises:
        UnreasonableError: One of them would take math-verify minutes.
        Exception: Whatever sympy raises.
    """
    for text in (gold, answer):
        if _is_unreasonable(text):
            raise UnreasonableError(f"too complex for math-verify: {text[:80]!r}")
    from math_verify import verify

    left, right = _parse(gold), _parse(answer)
    same = verify(list(left), list(right), timeout_seconds=None, raise_on_error=True)
    return bool(same) and not _differs_in_scale(left, right)


def is_same(first: str, answer: str) -> bool:
    """Check whether two completions' answers are equal; False if math-verify fails."""
    try:
        return is_equal(first, answer)
    except MemoryError:
        raise
    except Exception:  # counted when the completions are rewarded
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


# The completions of a group have the same reference answer, and often the same answer.
@lru_cache(maxsize=4096)
def _parse(answer: str) -> tuple[Any, ...]:
    """Parse an answer into math-verify's readings: an expression, if there is one, and its text."""
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
        # The left side cannot be parsed, as in "m_{\max} = 3"; the right side often can.
        readings += _parse(answer.rsplit("=", 1)[1])
    return tuple(readings)


def _differs_in_scale(gold: tuple[Any, ...], answer: tuple[Any, ...]) -> bool:
    """Check that no two numeric readings agree to a relative 1e-4, for a small reference.

    math-verify compares decimals to six places, and so finds 3e-8 and 5e-9 equal.
    """
    golds, answers = _values(gold), _values(answer)
    if not any(0 < abs(value) < 1e-2 for value in golds) or not answers:
        return False
    return not any(abs(left - right) <= 1e-4 * abs(left) for left in golds for right in answers)


def _values(readings: tuple[Any, ...]) -> list[complex]:
    return [complex(r.doit().evalf()) for r in readings if getattr(r, "is_number", False)]


@lru_cache(maxsize=1)
def _silence_time_limit_warning() -> None:
    """Suppress math-verify's warning that its time limits are off (see _UNREASONABLE)."""
    for name in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(name).addFilter(
            lambda record: "Timeout is disabled" not in record.getMessage()
        )
