"""Compare two mathematical answers, and refuse those that would take math-verify minutes."""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from typing import Any

from prl_lightning.rewards.normalize import normalize
from prl_lightning.rewards.structure import (
    are_set_and_tuple,
    as_choices,
    items,
    only_item,
    same_base,
    same_words,
    unequal_sides,
)

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

_DEGREES = re.compile(r"(.*\d)\^(?:\\circ|\{\\circ\})")
_IMAGINARY = re.compile(r"(?<=\d)i(?![A-Za-z])")  # math-verify looks for i as a word
_NUMBERS = re.compile(r"(?<![\d_^{])\d+ \d")
_POINTS = ((2.375, 0.75, 1.875), (0.3125, 5.125, 2.25), (-1.75, 2.875, 0.625), (7.75, -0.875, -3.5))

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


def is_equal(gold: str, answer: str) -> bool:
    r"""Check whether an answer equals the reference answer.

    math-verify compares the values. Around it stands what it does not know: units, choices, bases,
    how often an item of a list occurs, sets and tuples, words whose letters are not factors.

    Args:
        gold: The reference answer, as it would be written in a box.
        answer: The other answer.

    Raises:
        UnreasonableError: One of them would take math-verify minutes.
        Exception: Whatever sympy raises.

    Example:
        >>> is_equal("3 1/2", "3.5"), is_equal("1, 1, 2", "1, 2, 2"), is_equal("18", "£18")
        (True, False, True)
    """
    for text in (gold, answer):
        if _is_unreasonable(text):
            raise UnreasonableError(f"too complex for math-verify: {text[:80]!r}")
    (left, unit), (right, other_unit) = normalize(gold), normalize(answer)
    if unit and other_unit and unit != other_unit:
        return False
    left, right = as_choices(only_item(left), only_item(right))
    if left == right:
        return True
    for compare in (same_base, same_words):
        decided = compare(left, right)
        if decided is not None:
            return decided
    for split in (unequal_sides, items):
        lefts, rights = split(left), split(right)
        if len(lefts) == len(rights) > 1:
            return _match(lefts, rights)
    if unequal_sides(left)[1:] or unequal_sides(right)[1:]:
        return False  # math-verify raises
    return not are_set_and_tuple(left, right) and _have_equal_values(left, right)


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


def _match(lefts: list[str], rights: list[str]) -> bool:
    """Check that each item of one list has its own equal item in the other."""
    left_over = list(rights)
    for item in lefts:
        equal = next((other for other in left_over if other == item or is_equal(item, other)), None)
        if equal is None:
            return False
        left_over.remove(equal)
    return True


def _have_equal_values(gold: str, answer: str) -> bool:
    from math_verify import verify

    lefts, rights = _parse(gold), _parse(answer)
    if verify(list(lefts), list(rights), timeout_seconds=None, raise_on_error=True):
        return not _differ_in_size(lefts, rights)
    return any(_are_equal_where_real(left, right) for left in lefts for right in rights)


# The completions of a group have the same reference answer, and often the same answer.
@lru_cache(maxsize=4096)
def _parse(answer: str) -> tuple[Any, ...]:
    """Parse an answer into math-verify's readings: an expression, if there is one, and its text."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse
    from sympy import nan, zoo

    _silence_time_limit_warning()
    readings = parse(
        rf"\boxed{{{_IMAGINARY.sub(' i', _FULL_STOP.sub('', answer))}}}",
        [
            LatexExtractionConfig(
                try_extract_without_anchor=False,
                boxed_match_priority=0,
                normalization_config=NormalizationConfig(malformed_operators=True, nits=True),
            )
        ],
        extraction_mode="first_match",  # the box or nothing: never a fraction somewhere inside it
        parsing_timeout=None,
        raise_on_error=True,
    )
    readings = [r for r in readings if r is not zoo and r is not nan]  # 12:00 is no division
    if _SCIENTIFIC.search(answer):
        readings += _parse(_SCIENTIFIC.sub(r"\1\\times 10^{\2}", answer))
    elif found := _DEGREES.fullmatch(answer):
        readings += _parse(rf"({found[1]})\cdot\frac{{\pi}}{{180}}")
    elif _NUMBERS.search(answer):  # "1 2" is neither 12 nor 3
        readings = [answer]
    elif "=" in answer and all(isinstance(reading, str) for reading in readings):
        # The left side cannot be parsed, as in "m_{\max} = 3"; the right side often can.
        readings += _parse(answer.rsplit("=", 1)[1])
    return tuple(readings)


def _differ_in_size(gold: tuple[Any, ...], answer: tuple[Any, ...]) -> bool:
    """Check that no two numeric readings agree to a relative 1e-4.

    math-verify compares decimals to six places, and so finds 3e-8 and 5e-9 equal; and it finds
    1/200! and 1/199! equal, whose difference is nothing to it.
    """
    golds, answers = _values(gold), _values(answer)
    if not golds or not answers:
        return False
    return not any(abs(left - right) <= 1e-4 * abs(left) for left in golds for right in answers)


def _values(readings: tuple[Any, ...]) -> list[Any]:
    numbers = [r.doit().evalf(30) for r in readings if getattr(r, "is_number", False)]
    if any(isinstance(reading, str) and "%" in reading for reading in readings):
        numbers += [100 * number for number in numbers]  # 28% is 28 to math-verify as well
    return [number for number in numbers if number.is_finite]


def _are_equal_where_real(gold: Any, answer: Any) -> bool:
    """Check that two expressions with roots are equal as functions of real variables.

    sympy's variables are complex: there sqrt(1/n) and 1/sqrt(n) differ where n is negative.
    """
    from sympy import Expr, Pow

    if not (isinstance(gold, Expr) and isinstance(answer, Expr)):
        return False
    names = sorted(gold.free_symbols, key=str)
    powers = gold.atoms(Pow) | answer.atoms(Pow)
    has_roots = any(power.exp.is_integer is False for power in powers)
    if not has_roots or set(names) != answer.free_symbols or not 1 <= len(names) <= 3:
        return False
    seen = 0
    for point in _POINTS:
        at = dict(zip(names, point, strict=False))
        left, right = (side.subs(at).doit().evalf(20) for side in (gold, answer))
        if left.is_real and right.is_real:
            seen += 1
            if abs(left - right) > 1e-12 * abs(left):
                return False
        elif left.is_real or right.is_real:
            return False
    return seen > 1


@lru_cache(maxsize=1)
def _silence_time_limit_warning() -> None:
    """Suppress math-verify's warning that its time limits are off (see _UNREASONABLE)."""
    for name in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(name).addFilter(
            lambda record: "Timeout is disabled" not in record.getMessage()
        )
