r"""Write an answer in one form before it is compared.

math-verify reads LaTeX. Unicode and plain text become LaTeX here, and what is not part of the value
is removed: emphasis, spaces between signs, units and currencies.
"""

import calendar
import re
import unicodedata
from collections.abc import Callable
from functools import lru_cache

_FUNCTION = r"(?:arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|log|ln|exp|sqrt)"
_TEXT = r"\\(?:text|mathrm|operatorname)\s*"
_SYMBOLS = str.maketrans({
    "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": r"\div ",
    "±": r"\pm ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\neq ", "∞": r"\infty ", "√": r"\sqrt",
    "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "°": r"^\circ ", "、": ", ",
    "π": r"\pi ", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "λ": r"\lambda ",
    "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}",
    "…": r"\ldots ", "“": "", "”": "",
})  # fmt: skip

_BASES = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9}

# In this order, each pattern and what takes its place.
_Rule = tuple[str, str | Callable[[re.Match[str]], str]]
_LOOKS: list[_Rule] = [
    (r"\\(?:left|right|displaystyle|textstyle|[bB]igg?[lr]?)(?![A-Za-z])", ""),
    (r"\*\*|__|(?<!\\)(?:\$(?!\d)|\\[!()])", ""),
    (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
    (r"\\(?:text(?:bf|it|rm|normal)|emph|mbox)(?![A-Za-z])", r"\\text"),
    (r"\\(?:math(?:bf|it|sf)|boldsymbol|bm)\s*\{([^{}]*)\}", r"\1"),
    (_TEXT + r"\{\s*([ei])\s*\}", r"\1"),  # "2\mathrm{i}" is no unit
    (_TEXT + rf"\{{({_FUNCTION})\}}", r"\\\1 "),
    (rf"(?<![A-Za-z\\])({_FUNCTION}(?=\s*[({{])|pi(?![A-Za-z]))", r"\\\1"),
    (r"^\s*\\text\s*\{([^{}]*)\}\s*\.?\s*$", r"\1"),
    (r"(?<=\d)(?:\\,|\{,\})(?=\d{3}(?!\d))", ""),
    (r"(?<![\d.,(\[{])\d{1,3}(?:,\d{3})+(?![\d,])", lambda found: found[0].replace(",", "")),
    (r"(?:(?<!\\)\\[,;: ]|~|\\q?quad(?![A-Za-z])|\s)+", " "),
    (r"(?<![\d.,])\d{1,3}(?: \d{3})+(?! ?[\d/])", lambda found: found[0].replace(" ", "")),
    (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
    (r"\\log_\s*(\d+)\s", r"\\log_{\1}"),
    (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"\\varnothing(?![A-Za-z])|\\\{\s*\\\}", r"\\emptyset "),
    (r"(?<![\d.])(\d+)\.0+(?![\d.])", r"\1"),
    (r"\+\s*-", "-"),
]  # fmt: skip
_VALUE: list[_Rule] = [
    (r"(?:US)?\\?\$|[£€¥₹]|(?<![A-Za-z])(?:USD|EUR|GBP|JPY|CNY|INR)(?![A-Za-z])", ""),
    (rf"(?<=\d)\s*(?:{_TEXT}\{{\s*percent\s*\}}|percent)\s*$", r"\\%"),
    (rf"\s*(?:{_TEXT}\{{)?\s*\(?base (\d+)\)?\s*\}}?$", r"_{\1}"),
    (rf"_\{{\s*{_TEXT}\{{({'|'.join(_BASES)})\}}\s*\}}", lambda m: f"_{{{_BASES[m[1]]}}}"),
    (rf"(\^\s*\{{?\s*\\circ\s*\}}?)\s*(?:{_TEXT}\{{)?\s*[CF]\s*\}}?\s*$", ""),
    # math-verify reads "1 1/4" as 1/2.
    (r"(?<![\d./^_])(\d+) \\frac(?=\W)", r"\1\\frac"),
    (r"(?<![\d./])(\d+) (\d+) ?/ ?(\d+)(?![\d./])", r"\1\\frac{\2}{\3}"),
    (r"(?<![\d.])(\d*)\.(\d*)\\(?:overline|bar|dot)\s*\{?(\d+)\}?", lambda m: _fraction(m)),
    (r"(?<![\d.])(\d*)\.(\d*?)(\d+?)\3\3+\s*(?:\.\.\.|\\l?dots)", lambda m: _fraction(m)),
]  # fmt: skip
_SUPERSCRIPT = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ]+")
# Spaces part words, numbers, and the items of a list that would otherwise be thousands.
_SPACE = re.compile(r"(?<![A-Za-z\d,]) | (?!\w)|(?<=\d) (?=[A-Za-z])|(?<=,) (?!\d{3}(?!\d))")

# A unit follows a number: \text{...}, \mathrm{...}, or words. Words are units if they have four or
# more letters, or are among these. Where a word is known, two different ones are told apart.
_UNIT = re.compile(
    rf"(?:(?<=[\d)}}!])|(?<=\\pi))(\s*)((?=[\\A-Za-z])(?:\\text\s*\{{[^{{}}\d]*\}}|{_TEXT}\{{(?:[^{{}}]|\{{[^{{}}]*\}})*\}}"
    r"|[A-Za-z]|\^\s*(?:\{-?\d\}|-?\d)|[\s/.])+)$"
)
_MEASURES = {
    word: words.split()[0]
    for words in (
        "mm millimeter millimetre", "cm centimeter centimetre", "m meter metre", "km kilometer "
        "kilometre", "in inch inche", "ft foot feet", "yd yard", "mi mile", "mg milligram",
        "g gram", "kg kilogram", "lb pound", "oz ounce", "ms millisecond", "s sec second",
        "min minute",
        "h hr hour", "day", "week", "month", "year yr", "mL ml milliliter millilitre",
        "L l liter litre", "cent", "dollar USD", "Rs R", "degree deg", "radian rad", "mph",
        "kph kmh",
        "N newton", "J joule", "kJ", "W watt", "kW", "V volt", "Hz hertz", "kHz", "MHz",
        "Pa pascal", "kPa", "cup", "gal gallon", "mol mole", "eV", "sq square", "cu cubic", "per",
    )
    for word in words.split()
}  # fmt: skip
_NO_UNITS = frozenset(
    [*calendar.month_name, "infinity", "choose", "union", "base", "where", "when", "with", "alpha"]
    + ["beta", "gamma", "theta", "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh", "sqrt"]
)


def tidy(answer: str) -> str:
    r"""Remove what only changes how an answer looks: emphasis, spaces, Unicode, `\left`.

    Example:
        >>> tidy(r"$\left( 1,\ 2 \right)$"), tidy("½ x²"), tidy("1, 200")
        ('(1,2)', '1/2x^{2}', '1, 200')
    """
    return _squeeze(_plain(answer))


@lru_cache(maxsize=4096)
def normalize(answer: str) -> tuple[str, str]:
    r"""Reduce an answer to its value and its unit.

    Returns:
        The tidied value, in which mixed numbers and repeating decimals are fractions; and the unit,
        "" if there is none or it is not a known one.

    Example:
        >>> normalize("18 dollars"), normalize("1 1/4"), normalize(r"0.\overline{3}")
        (('18', 'dollar'), ('1\\frac{1}{4}', ''), ('\\frac{3}{9}', ''))
    """
    text, unit = _without_unit(_apply(_VALUE, _plain(answer)))
    return _squeeze(text), unit


# Both forms of an answer are asked for, one after the other.
@lru_cache(maxsize=4096)
def _plain(answer: str) -> str:
    return _apply(_LOOKS, _in_latex(answer))


def _apply(rules: list[_Rule], text: str) -> str:
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text.strip()


def _squeeze(text: str) -> str:
    return _SPACE.sub("", text)


def _in_latex(text: str) -> str:
    """Write Unicode's mathematical signs, digits and fractions in LaTeX."""
    text = _SUPERSCRIPT.sub(lambda found: f"^{{{unicodedata.normalize('NFKC', found[0])}}}", text)
    signs = []
    for sign in text.translate(_SYMBOLS):
        plain = unicodedata.normalize("NFKC", sign)
        if "⁄" in plain[1:]:  # ½, perhaps behind a number
            plain = f" {plain}"
        signs.append(str(unicodedata.decimal(sign, plain)))
    return "".join(signs).replace("⁄", "/")


def _fraction(found: re.Match[str]) -> str:
    """Return a repeating decimal's value: 0.1666... is (16 - 1) / 90."""
    whole, once, repeated = found.groups()
    numerator = int(f"{whole}{once}{repeated}") - int(f"{whole}{once}" or 0)
    return rf"\frac{{{numerator}}}{{{'9' * len(repeated)}{'0' * len(once)}}}"


def _without_unit(text: str) -> tuple[str, str]:
    found = _UNIT.search(text)
    if not found:
        return text, ""
    bare = re.findall(r"[A-Za-z]+", re.sub(_TEXT + r"\{.*\}", "", found[2]))
    attached = not found[1] and len(bare[:1]) == 1 and found[2].startswith(bare[0])
    if (attached and len(bare[0]) == 1) or not all(map(_is_unit, bare)):
        return text, ""  # 5m is a product, 5 m is a length
    if re.search(r"(?<![\\A-Za-z])[A-Za-z]{3}", text[: found.start()]):
        return text, ""  # 7 hours 30 minutes
    words = [word for word in re.findall(r"[A-Za-z]+", found[2]) if word not in ("text", "mathrm")]
    unit = _MEASURES.get(words[0].removesuffix("s") or words[0], "") if len(words) == 1 else ""
    return text[: found.start()], unit


def _is_unit(word: str) -> bool:
    if word in _NO_UNITS:
        return False
    return len(word) > 3 or word in _MEASURES or word.removesuffix("s") in _MEASURES
