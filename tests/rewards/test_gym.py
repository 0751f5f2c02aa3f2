from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from prl_lightning.rewards import NO_ANSWER, ReasoningGymReward, RewardLimits, RewardSum
from prl_lightning.rewards.gym import EVALUATING, given_answer

# How an answer would look that each verifier parses, with a name that only the answer has.
HOSTILE = ("{}", "[{}]", "{}+1", "({}, 1)", '["{}"]', '{{"a": "{}"}}', "1 {}", "{}()", "1\n{},1")
NAME = "name_of_the_answer"

_watched: list[str] | None = None


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if _watched is None or event not in ("compile", "exec"):
        return
    source = arguments[0]
    names = getattr(source, "co_names", ()) + getattr(source, "co_consts", ())
    if NAME in f"{names or source!r}":
        _watched.append(event)


@contextmanager
def evaluations() -> Iterator[list[str]]:
    """Record what Python compiles or runs that has the name of the answer in it."""
    global _watched
    _watched = found = []
    try:
        yield found
    finally:
        _watched = None


@pytest.fixture(scope="module", autouse=True)
def _hook() -> None:
    sys.addaudithook(_watch)  # it cannot be removed


def made(task: str, index: int = 0, **config: Any) -> dict[str, list[Any]]:
    """The columns of one row."""
    from reasoning_gym import create_dataset

    entry = create_dataset(task, seed=0, size=4, **config)[index]
    return {"task": [task], "entry": [entry], "config": [config]}


def score(text: str, columns: dict[str, list[Any]], **settings: Any) -> float:
    [reward] = ReasoningGymReward(**settings)(["?"], [text], **columns)
    return reward


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer>4</answer>", "4"),
        ("<answer>3</answer>, no: <answer>\n4 </answer>.", "4"),
        ("<Answer>4</ANSWER>", "4"),
        (r"<answer>\boxed{4}</answer>", "4"),
        (r"\boxed{3} <answer>4</answer> \boxed{5}", "4"),
        (r"\boxed{3} so \boxed{4}", "4"),
        (r"<answer>3 \boxed{4}", "4"),
        ("<answer>3 <answer>4</answer>", "4"),
        ("<answer>4</answer></answer>", "4"),
        ("<answer>4</answer> <answer>5", "4"),
        ("<answer> </answer>", None),
        ("<answer>4", None),
        ("4</answer>", None),
        (r"\boxed{}", None),
        ("4", None),
        ("", None),
    ],
)
def test_where_the_answer_is(text: str, answer: str | None) -> None:
    assert given_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "settings", "reward"),
    [
        ("3 * 4 is 11, no: 12.", {"pattern": r"-?\d+", "group": 0}, 1.0),
        ("12 or 13", {"pattern": r"-?\d+", "group": 0}, 0.0),
        ("It is 12 = 3 * 4", {"pattern": r"is (\d+)"}, 1.0),
        ("<answer>12</answer> 13", {"pattern": r"(\d+)"}, 0.0),
        ("twelve", {"pattern": r"(\d+)"}, 0.0),
    ],
)
def test_a_pattern_finds_the_answer_instead(
    text: str, settings: dict[str, Any], reward: float
) -> None:
    entry = {"question": "3 * 4", "answer": "12", "metadata": {}}
    columns = {"task": ["products"], "entry": [entry], "config": [{}]}
    assert score(text, columns, **settings) == reward
    answers = ReasoningGymReward(**settings).answers([text, "none", text])
    assert answers == ([NO_ANSWER] * 3 if text == "twelve" else [0, NO_ANSWER, 0])


def test_a_pattern_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="no group 1"):
        ReasoningGymReward(pattern=r"\d+")


def test_the_verifier_of_the_task_scores_the_answer() -> None:
    columns = made("products", min_digits=1, max_digits=1)
    answer = columns["entry"][0]["answer"]
    assert score(f"<answer>{answer}</answer>", columns) == 1
    assert score(f"<answer>{answer}.0</answer>", columns) == 1  # the task compares numbers
    assert score(answer, columns) == 0


def test_a_part_of_the_score_is_kept_unless_there_is_a_threshold() -> None:
    columns = made("rectangle_count")
    text = f"<answer>{int(columns['entry'][0]['answer']) + 1}</answer>"
    part = score(text, columns)
    assert 0 < part < 1
    assert score(text, columns, threshold=part) == 1
    assert score(text, columns, threshold=part + 0.01) == 0
    with pytest.raises(ValueError, match=r"threshold=0:"):
        ReasoningGymReward(threshold=0)


def test_the_verifier_has_the_rows_configuration() -> None:
    near = {"min_num_decimal_places": 1, "max_num_decimal_places": 1}
    far = {"min_num_decimal_places": 6, "max_num_decimal_places": 6}
    entry = {"answer": "1.5", "metadata": {}}
    reward = ReasoningGymReward()
    rewards = reward(
        ["?", "?"],
        ["<answer>1.55</answer>"] * 2,
        task=["decimal_arithmetic"] * 2,
        entry=[entry] * 2,
        config=[near, far],
    )
    assert rewards == [1, 0]


def test_an_answer_that_the_verifier_cannot_read_is_counted_and_scores_0() -> None:
    columns = made("prime_factorization")
    reward = ReasoningGymReward()
    assert reward(["?"], ["<answer>two</answer>"], **columns) == [0]
    assert reward.failures == 1
    assert reward(["?"], [f"<answer>{columns['entry'][0]['answer']}</answer>"], **columns) == [1]
    assert reward.failures == 0


def test_a_verifier_that_refuses_the_tasks_own_answer_is_an_error() -> None:
    columns = made("prime_factorization")
    columns["entry"][0]["answer"] = "two"
    with pytest.raises(ValueError, match="two"):
        score("<answer>4</answer>", columns)


def test_equal_answers_have_equal_numbers() -> None:
    texts = ["<answer>4</answer>", r"\boxed{5}", "none", "<answer>4.0</answer>"]
    assert ReasoningGymReward().answers(texts) == [0, 1, NO_ANSWER, 0]


def test_tasks_that_run_the_answer_are_refused_by_name() -> None:
    columns = {"task": ["n_queens"], "entry": [{}], "config": [{}]}
    with pytest.raises(ValueError, match=r"\['n_queens'\].*evaluates_answers=true"):
        score("<answer>1</answer>", columns)
    ReasoningGymReward().check_tasks(["products"])
    ReasoningGymReward(evaluates_answers=True).check_tasks(EVALUATING)


# Slow to make, and read: a row of these takes seconds.
SLOW = {"arc_agi", "codeio", "figlet_font", "futoshiki", "group_anagrams", "knight_swap", "acre",
        "number_sequence", "composite", "zebra_puzzles", "sokoban", "word_ladder"}  # fmt: skip


def test_no_other_task_runs_the_answer() -> None:
    from reasoning_gym.factory import DATASETS, create_dataset

    evaluating = set()
    for task in sorted(set(DATASETS) - SLOW):
        dataset = create_dataset(task, seed=1, size=2)
        entry = dataset[0]
        for form in HOSTILE:
            with suppress(Exception), evaluations() as found:
                dataset.score_answer(form.format(NAME), entry)
            evaluating |= {task} if found else set()
    assert evaluating == EVALUATING


@pytest.mark.process
def test_it_works_in_the_sandbox() -> None:
    rows = [made("products", index) for index in range(2)] + [made("prime_factorization")]
    columns = {name: [row[name][0] for row in rows] for name in rows[0]}
    answers = [entry["answer"] for entry in columns["entry"]]
    texts = [f"<answer>{answers[0]}</answer>", f"{answers[1]}", "<answer>two</answer>"]
    rewards = RewardSum([ReasoningGymReward()], limits=RewardLimits(workers=1, seconds=60))
    try:
        scores = rewards.score(["?"] * 3, texts, columns)
        numbers = rewards.answers([texts])
    finally:
        rewards.stop()
    assert scores.total.tolist() == [1, 0, 0]
    assert scores.failures == {"ReasoningGymReward": 1}
    assert not scores.failed_calls
    assert numbers is not None
    assert numbers.numbers == [[0, NO_ANSWER, 1]]
