"""Verdicts on pairs of answers, against those of a reader.

`answers.jsonl` has a reference answer, an answer, whether it is right, and the public report it
comes from.
"""

import json
from pathlib import Path

import pytest

from prl_lightning.rewards import MathReward
from prl_lightning.rewards.structure import as_choices, same_base, same_words

PAIRS = [
    json.loads(line)
    for line in Path(__file__).with_name("answers.jsonl").read_text(encoding="utf-8").splitlines()
]


def test_every_pair_is_judged_as_a_reader_judges_it() -> None:
    reward = MathReward()
    completions = [rf"So it is $\boxed{{{pair['answer']}}}$." for pair in PAIRS]
    values = reward(completions, completions, answer=[pair["gold"] for pair in PAIRS])
    wrong = [pair for pair, value in zip(PAIRS, values, strict=True) if value != pair["right"]]
    assert wrong == []
    assert reward.failures == 0
    assert len(PAIRS) > 300


def test_completions_with_the_same_answer_in_two_forms_get_one_vote() -> None:
    """A majority vote uses the same comparison."""
    forms = ["1 1/4", r"\frac{5}{4}", "1¼", "11/4", "ABC", "CBA", "18 dollars", "£18"]
    numbers = MathReward().answers([rf"\boxed{{{form}}}" for form in forms])
    assert numbers == [0, 0, 0, 1, 2, 3, 4, 4]


@pytest.mark.parametrize(
    ("gold", "answer", "verdict"),
    [
        ("52_8", "52_{8}", True), ("52_8", "42_{10}", True), ("52_8", "52", True),
        ("52_8", "53_8", False), ("52_8", "52_9", False), ("89_8", "52_8", False),
        ("52_8", "52_{87}", False), ("x_1", "x_2", None), ("52", "52", None),
    ],
)  # fmt: skip
def test_bases(gold: str, answer: str, verdict: bool | None) -> None:
    assert same_base(gold, answer) is verdict


@pytest.mark.parametrize(
    ("gold", "answer", "verdict"),
    [
        ("listen", "silent", False), ("No", "no", True), ("no", "on", False), ("xyz", "zyx", None),
        ("ab", "ba", None), ("ABC", "CBA", False), ("mgh", "hgm", None), ("x+no", "x+on", False),
        (r"\tan x", r"\tan x", None), ("even", "odd", None),
    ],
)  # fmt: skip
def test_words(gold: str, answer: str, verdict: bool | None) -> None:
    assert same_words(gold, answer) is verdict


def test_choices() -> None:
    assert as_choices("B", "(B)the red one") == ("B", "B")
    assert as_choices("B", "A.12") == ("B", "A")
    assert as_choices("(B)", r"\text{(B)}12") == ("B", "B")
    assert as_choices("A,C", "AC") == ("A,C", "A,C")
    assert as_choices("5", "A.12") == ("5", "A.12")
