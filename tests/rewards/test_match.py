from typing import Any

import pytest

from prl_lightning.rewards import ExactMatch, RegexMatch
from prl_lightning.rewards.match import reference_texts, same_text


@pytest.mark.parametrize(
    ("completion", "reference", "expected"),
    [
        ("27", 27.0, 1.0), (" 27.0\n", "27", 1.0), ("033", "33", 1.0), ("+2", 2, 1.0),
        ("-27.0", "-27", 1.0), ("27.", "27", 1.0), (".5", 0.5, 1.0), ("0.0000001", 1e-7, 1.0),
        ("12345678901234567891", 12345678901234567890, 0.0),  # would be equal as floats
        ("12345678901234567890", 12345678901234567890, 1.0),  # likewise
        ("yes", "Yes", 0.0), ("27 m", "27", 0.0), ("1,000", "1000", 0.0), ("0.5", "1/2", 0.0),
        ("b", ["a", "b"], 1.0), ("c", ["a", "b"], 0.0), ("anything", None, None),
    ],
)  # fmt: skip
def test_exact_match(completion: Any, reference: Any, expected: Any) -> None:
    assert ExactMatch()(["?"], [completion], answer=[reference]) == [expected]


@pytest.mark.parametrize(
    ("completion", "expected"),
    [("a=3 b=4", 1.0), ("a=4 b=3", 0.0), ("none", 0.0), ("b=4.0", 1.0), ("b=", 0.0)],
)
def test_regex_match_compares_the_last_match(completion: Any, expected: Any) -> None:
    assert RegexMatch(r"\w=([\d.]*)")(["?"], [completion], answer=["4"]) == [expected]


def test_regex_match_takes_a_named_group_and_another_column() -> None:
    reward = RegexMatch(r"(?P<sign>-?)(?P<digits>\d+)", column="gold", group="digits")
    completions = ["-5", [{"role": "assistant", "content": "7"}]]
    assert reward(["?", "?"], completions, gold=[5, 8]) == [1.0, 0.0]
    whole = RegexMatch(r"-?\d", group=0)
    assert whole(["?"], ["1 -5"], answer=["-5"]) == [1.0]


GSM8K = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nTogether 48+24 = 72.\n#### 72"


@pytest.mark.parametrize(
    ("pattern", "reference", "expected"),
    [
        (r"#### *(\S+)", GSM8K, 1.0), (r"(-?\d+)", GSM8K, 1.0),
        (r"#### *(\S+)", GSM8K.replace("#### 72", "#### 24"), 0.0),
        (r"#### *(\S+)", "72", 1.0), (r"#### *(\S+)", 72.0, 1.0),  # without a match: as it is
        (r"#### *(\S+)", ["a #### 70", GSM8K], 1.0), (r"#### *(\S*)", "72 ####", 0.0),
        (r"(\d+)", "72.0", 1.0), (r"(\d)", "72", 0.0),  # a number is a whole answer
    ],
)  # fmt: skip
def test_regex_match_finds_the_answer_in_the_reference_too(
    pattern: str, reference: Any, expected: float
) -> None:
    completions = ["48 + 24 = 72\n#### 72", "#### 72."]
    rewards = RegexMatch(pattern)(["?"] * 2, completions, answer=[reference] * 2)
    assert rewards == [expected, expected]


def test_group_that_took_no_part_is_no_answer() -> None:
    assert RegexMatch(r"x(\d)?")(["?"], ["x2 x"], answer=["2"]) == [0.0]


@pytest.mark.parametrize("bad", ["", "  ", [], float("nan"), {"a": 1}, True, [None]])
def test_reference_that_holds_no_answer_is_an_error(bad: Any) -> None:
    with pytest.raises(ValueError, match="reference answer "):
        reference_texts(bad)


def test_same_text_is_symmetric() -> None:
    for left, right in [("1.0", "1"), ("a", "a "), ("1e3", "1000"), ("\u0663", "3.5")]:
        assert same_text(left, right) == same_text(right, left)
    assert not same_text("1e3", "1000")


def test_errors_name_what_to_mend() -> None:
    with pytest.raises(ValueError, match=r"'\(' is not a regular expression"):
        RegexMatch("(")
    with pytest.raises(ValueError, match=r"has no group 2: put the answer in parentheses"):
        RegexMatch("(a)", group=2)
    with pytest.raises(ValueError, match="has no group 'b'"):
        RegexMatch("(?P<a>a)", group="b")
    with pytest.raises(ValueError, match=r"ExactMatch reads the column 'answer'.*\['gold'\]"):
        ExactMatch()(["?"], ["a"], gold=["a"])


def test_answers_are_numbered_as_texts_or_numerals() -> None:
    reward = RegexMatch(r"= *(\S*)")
    assert reward.answers(["= 4", "= 4.0", "= 5", "?", "= x", "="]) == [0, 0, 1, -1, 2, -1]
    assert ExactMatch().answers(["yes", " yes", "no", ""]) == [0, 0, 1, -1]
