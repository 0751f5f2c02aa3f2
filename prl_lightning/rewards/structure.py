r"""What an answer's text says of its structure: choices, lists, sets, bases and words.

All texts here are normalized; see `prl_lightning.rewards.normalize`.
"""

import re
from collections import Counter

_CHOICE = re.compile(r"(?:\\(?:text|mathrm)\{)?\(?([A-Z])[).:](?!\()")
_LETTERS = re.compile(r"[A-Z](?:,[A-Z])+")
_UNEQUAL = re.compile(r"\\neq?(?![A-Za-z])|\\not=")
_SEPARATOR = re.compile(
    r",?\\text\{(?:and|or)\}|,? ?(?<![A-Za-z\\])(?:and|or)(?![A-Za-z]) ?|[,;] ?"
    r"|(?P<bracket>[{}()\[\]])"
)
_BASE = re.compile(r"([0-9A-F]*\d[0-9A-F]*)_\{?(\d+)\}?")
_SET = re.compile(r"\\\{([^|:{}]*)\\\}")
_TUPLE = re.compile(r"[(\[].*[)\]]")
_WORD = re.compile(r"(?<![A-Za-z\\])[A-Za-z]{2,}")
_PRODUCT = re.compile(r"[A-Za-np-z]{2}|[a-d]+|[i-n]+|[p-t]+|[u-z]+|[^aeiouA-Z]+")


def as_choices(gold: str, answer: str) -> tuple[str, str]:
    r"""Reduce answers to the letters of choices, if one of them is nothing else.

    Example:
        >>> as_choices("A", r"\text{A)}12"), as_choices("A,C", "CA"), as_choices("x", "A)12")
        (('A', 'A'), ('A,C', 'C,A'), ('x', 'A)12'))
    """
    pair = [re.sub(r"\(([A-Z])\)(?=,|$)", r"\1", text) for text in (gold, answer)]
    if any(re.fullmatch("[A-Z]", text) for text in pair):
        found = [_CHOICE.match(text) for text in pair]
        pair = [match[1] if match else text for match, text in zip(found, pair, strict=True)]
    elif any(_LETTERS.fullmatch(text) for text in pair):
        pair = [",".join(text) if re.fullmatch("[A-Z]{2,}", text) else text for text in pair]
    return pair[0], pair[1]


def only_item(text: str) -> str:
    r"""Return the item of a set that has one, and other texts as they are.

    Example:
        >>> only_item(r"\{(1,2)\}"), only_item(r"\{1,2\}")
        ('(1,2)', '\\{1,2\\}')
    """
    found = re.fullmatch(r"\\\{((?:(?!\\[{}]).)*)\\\}", text)
    return found[1] if found and len(items(found[1])) == 1 else text


def unequal_sides(text: str) -> list[str]:
    r"""Split an answer at its "not equal" signs."""
    return _UNEQUAL.split(text)


def items(text: str) -> list[str]:
    r"""Split a list at the commas, semicolons, "and" and "or" outside of all brackets.

    Example:
        >>> items(r"(1,2),3\text{and}x=\frac{1}{2}")
        ['(1,2)', '3', 'x=\\frac{1}{2}']
    """
    depth, start, parts = 0, 0, []
    for found in _SEPARATOR.finditer(text):
        if found["bracket"]:
            depth += 1 if found["bracket"] in "{([" else -1
        elif depth == 0:
            parts.append(text[start : found.start()])
            start = found.end()
    return [part for part in (*parts, text[start:]) if part.strip()]


def same_base(gold: str, answer: str) -> bool | None:
    """Compare numbers with a base, as in 52_8; `None` if there is none.

    math-verify drops the base. An answer may leave it out; two bases are two ways to write a value.
    """
    pair = (gold, answer)
    found = [_BASE.fullmatch(text) for text in pair]
    if not any(found):
        return None
    digits = [
        match[1] if match else text for match, text in zip(found, (gold, answer), strict=True)
    ]
    bases = {int(match[2]) for match in found if match}
    if len(bases) == 1 or max(bases) > 36 or min(bases) < 2:
        return len(bases) == 1 and digits[0] == digits[1]
    try:
        left, right = (int(match[1], int(match[2])) for match in found if match)
    except ValueError:  # a digit that the base does not have
        return False
    return left == right


def are_set_and_tuple(gold: str, answer: str) -> bool:
    r"""Check whether one is a set of several items, as `\{2,3\}`, the other a tuple or interval."""
    for one, other in ((gold, answer), (answer, gold)):
        found = _SET.fullmatch(one)
        if found and len(items(found[1])) > 1 and _TUPLE.fullmatch(other):
            return True
    return False


def same_words(gold: str, answer: str) -> bool | None:
    """Compare words, whose letters math-verify multiplies; `None` if they are not only words.

    Two letters, neighbours in the alphabet as in xyz, and letters without a vowel are factors; the
    letter o is none.
    """
    left, right = (
        Counter(word.lower() for word in _WORD.findall(text) if not _PRODUCT.fullmatch(word))
        for text in (gold, answer)
    )
    if left == right:
        return True if left and gold.lower() == answer.lower() else None
    first, second = (Counter("".join(sorted(word)) for word in words) for words in (left, right))
    return False if first == second else None
