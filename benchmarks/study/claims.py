"""Claims in a model's prose that can be checked: equations, and greatest common divisors."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from judging import Step

NUMBER = r"\d+(?:,\d{3})*"
SIDE = rf"-?{NUMBER}(?: *[-+*] *{NUMBER})*"
EQUATION = re.compile(rf"{SIDE}(?: *= *{SIDE})+")
# Numbers and signs without a word between them. Only the whole of them is an equation, so that
# parts of longer expressions are none.
RUN = re.compile(r"(?:[\d+*/=^%()&~<>|\\ -]|[.,](?=\d))+")
OPENING = re.compile(r"[ (*\\]*")
LABEL = re.compile(rf" *(?:\d+\) |- )?{OPENING.pattern}")
DIVISOR = re.compile(
    r"(?<!of )(?<!of the )(?:gcd|greatest common (?:divisor|factor))(?: \(gcd\))?"
    r"(?: of(?: the(?: two)? numbers)?)? ?"
    rf"\(?({NUMBER})(?:,| and|, and) ?({NUMBER})\)?(?: is:?| *=) *\**(?P<claimed>{NUMBER})",
    re.IGNORECASE,
)
# Next to one of these a run is part of something else, such as "17 = 5 * 3 remainder 2".
PARTIAL = {
    *("step", "mod", "modulo", "remainder", "r", "times", "plus", "minus", "divided", "over"),
    *("multiplied", "to", "power", "percent", "squared", "hundred", "thousand", "twice", "half"),
}
SAME_LENGTH = str.maketrans("×·∙−–÷", "***--/")


@dataclass(frozen=True)
class Claim:
    """A claim of a text.

    Attributes:
        start, end: of what is claimed: behind the first equals sign, or behind "is".
        is_wrong: it is.
    """

    start: int
    end: int
    is_wrong: bool


def whole(number: str) -> int:
    """A number with or without commas."""
    return int(number.replace(",", ""))


def value_of(side: str) -> int:
    """The value of a sum of products of whole numbers.

    Example:
        >>> value_of("2 + 3 * 4 - 1,000")
        -986
    """
    terms = re.findall(rf"[-+]? *{NUMBER}(?: *\* *{NUMBER})*", side)
    return sum(
        (-1 if term.startswith("-") else 1) * math.prod(map(whole, re.findall(NUMBER, term)))
        for term in terms
    )


def normal(text: str) -> str:
    """The text with one sign for each operation, as long as before."""
    text = text.translate(SAME_LENGTH).replace("\t", " ")
    return re.sub(r"(?<=\d)( ?)x(?= ?\d)", r"\1*", text)


def goes_on(text: str, end: int) -> bool:
    """Whether what stands behind a part of a text changes its meaning."""
    after = text[end:].partition("\n")[0]
    word = re.match(r"\W*([^\W\d_]+)", after)
    is_longer = re.match(r"\w|[.,]\d| *[-+/=^%<>~|\\&*(] *[\d(]", after)
    return bool(is_longer or (word and word[1].lower() in PARTIAL))


def goes_before(text: str, start: int) -> bool:
    """Whether what stands before a part of a text changes its meaning."""
    before = text[:start].rpartition("\n")[2]
    word = re.search(r"(\\?)([^\W\d_]+)\W*$", before)
    is_longer = re.search(r"\w$|\d *: +$", before)
    return bool(is_longer or (word and (word[1] or word[2].lower() in PARTIAL)))


def divisors_in(text: str) -> Iterator[Claim]:
    """Claims of a greatest common divisor in a normal text."""
    for match in DIVISOR.finditer(text):
        if not goes_on(text, match.end()):
            first, second, claimed = map(whole, match.groups())
            is_wrong = math.gcd(first, second) != claimed
            yield Claim(match.start("claimed"), match.end(), is_wrong)


def equations_in(text: str) -> Iterator[Claim]:
    """Equations with an operation between sides that differ, in a normal text."""
    for run in RUN.finditer(text):
        starts_line = text[: run.start()].endswith("\n") or not run.start()
        written = (LABEL if starts_line else OPENING).sub("", run[0], count=1)
        start = run.end() - len(written)
        written = written.rstrip(" ()*\\")
        end = start + len(written)
        sides = [side.replace(" ", "") for side in written.split("=")]
        is_claim = len(set(sides)) > 1 and re.search(r"\d *[-+*]", written)
        is_whole = not (goes_before(text, start) or goes_on(text, end))
        if is_claim and is_whole and EQUATION.fullmatch(written):
            claimed = start + written.index("=") + 1
            yield Claim(claimed, end, len(set(map(value_of, sides))) > 1)


def claims_in(text: str) -> list[Claim]:
    """The claims of a text that can be checked.

    Example:
        >>> claims_in("So 3 x 4 = 13, I think.")
        [Claim(start=10, end=13, is_wrong=True)]
    """
    text = normal(text)
    equations = equations_in(DIVISOR.sub(lambda match: "_" * len(match[0]), text))
    return [*divisors_in(text), *equations]


def claims_of(prompt: str, tokens: list[str]) -> list[Step]:
    """The claims of a completion that can be checked, as steps of the tokens that claim.

    Args:
        prompt: not used.
        tokens: of the completion as text, without the end of the sequence.

    Example:
        >>> [wrong] = claims_of("", ["3 * 4", " =", " 13", ", I think."])
        >>> wrong.tokens, wrong.is_slip
        (slice(2, 3, None), True)
    """
    ends = list(accumulate(map(len, tokens)))
    steps = []
    for claim in claims_in("".join(tokens)):
        first = next(place for place, end in enumerate(ends) if end > claim.start)
        last = next(place for place, end in enumerate(ends) if end >= claim.end)
        steps.append(Step(slice(first, last + 1), claim.is_wrong))
    return steps
