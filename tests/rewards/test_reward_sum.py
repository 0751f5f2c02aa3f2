import asyncio
import math
import operator
import pickle
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser

from prl_lightning.rewards import (
    ExactMatch,
    MathReward,
    RegexMatch,
    RewardFunction,
    RewardScores,
    RewardSum,
    completion_text,
)

PAIR = ("four", "xyz")
CHAT = [{"role": "user", "content": "1 + 1?"}]


def length(completions: Any, **columns: Any) -> list[float]:
    return [float(len(completion_text(completion))) for completion in completions]


def even(completions: Any) -> list[float | None]:
    return [1.0 if len(text) % 2 == 0 else None for text in completions]


def returning(values: Any) -> RewardFunction:
    def reward(completions: Any, **columns: Any) -> Any:
        return values

    return reward


def score(
    *functions: RewardFunction,
    weights: list[float] | None = None,
    completions: Sequence[str] = PAIR,
    **columns: Any,
) -> RewardScores:
    prompts = ["?"] * len(completions)
    return RewardSum(functions, weights).score(prompts, completions, columns)


def test_total_is_the_weighted_sum_of_the_parts() -> None:
    scores = score(length, returning([1, -2]), weights=[0.5, 3.0])
    assert scores.total.tolist() == [0.5 * 4 + 3 * 1, 0.5 * 3 + 3 * -2]
    assert scores.total.dtype == torch.float32
    assert {name: part.tolist() for name, part in scores.parts.items()} == {
        "length": [4.0, 3.0],
        "reward": [1.0, -2.0],
    }


def test_none_is_nan_in_its_part_and_nothing_in_the_total() -> None:
    scores = score(length, even)
    assert scores.total.tolist() == [5.0, 3.0]
    assert scores.parts["even"][0] == 1.0
    assert math.isnan(scores.parts["even"][1])
    assert scores.unrewarded == 0


def test_completion_that_nothing_applies_to_is_zero_and_reported() -> None:
    with pytest.warns(UserWarning, match=r"1 of 2 completions .*\['even'\]"):
        scores = score(even)
    assert scores.total.tolist() == [1.0, 0.0]
    assert scores.unrewarded == 1


class Asking:
    """Keeps a lock of its event loop, as a client keeps connections."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()

    async def __call__(self, completions: Any) -> list[float]:
        return list(await asyncio.gather(*map(self.one, completions)))

    async def one(self, text: str) -> float:
        async with self.lock:  # a lock that was waited for belongs to its event loop
            await asyncio.sleep(0)
        return float(len(text))


def test_async_functions_are_awaited_in_one_event_loop() -> None:
    rewards = RewardSum([Asking(), partial(alength, more=1)], [1.0, 10.0])

    def both() -> list[float]:
        return rewards.score(["?"] * 2, PAIR, {}).total.tolist()

    async def from_a_notebook() -> list[float]:
        return both()

    assert both() == asyncio.run(from_a_notebook()) == [54.0, 43.0]


async def alength(completions: Any, more: int, fails: bool = False) -> list[float]:
    if fails:
        raise KeyError("no such thing")
    return [float(len(text) + more) for text in completions]


def test_an_exception_of_an_async_function_is_its_functions() -> None:
    with pytest.raises(RuntimeError, match=r"'alength' raised KeyError: 'no such thing'"):
        score(partial(alength, more=1, fails=True))


def test_functions_get_the_columns_they_accept() -> None:
    seen = {}

    def narrow(completions: Any, answer: Any) -> list[float]:
        seen["narrow"] = (completions, answer)
        return [0.0] * 2

    def wide(prompts: Any, **columns: Any) -> list[float]:
        seen["wide"] = (prompts, columns)
        return [0.0] * 2

    score(narrow, wide, answer=["4", "3"], level=[1, 2])
    assert seen["narrow"] == (["four", "xyz"], ["4", "3"])
    assert seen["wide"] == (
        ["?", "?"],
        {"completions": ["four", "xyz"], "answer": ["4", "3"], "level": [1, 2]},
    )


def test_completion_has_the_form_of_its_prompt() -> None:
    seen = []

    def reward(completions: Any, **columns: Any) -> Any:
        seen.extend(completions)
        return [completion_text(completion) == "2" for completion in completions]

    scores = RewardSum([reward]).score([CHAT, "1 + 1?"], ["2", "2"], {})
    assert seen == [[{"role": "assistant", "content": "2"}], "2"]
    assert scores.total.tolist() == [1.0, 1.0]


def test_completion_text_reads_typed_parts_and_refuses_the_rest() -> None:
    parts = [{"type": "image"}, {"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert completion_text([{"role": "assistant", "content": parts}]) == "ab"
    for bad in (None, [], 3, [{"role": "assistant"}]):
        with pytest.raises(TypeError, match=re.escape(repr(bad))):
            completion_text(bad)


@pytest.mark.parametrize(
    "values", [np.array([1.0, 2.0]), torch.tensor([1, 2]), (np.float32(1), torch.tensor(2.0))]
)
def test_arrays_and_tensors_are_rewards(values: Any) -> None:
    assert score(returning(values)).total.tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0], r"'reward' returned 1 rewards for 2 completions: return one for each"),
        ([1.0, float("nan")], r"'reward' returned nan for completion 1: return a finite number"),
        ([float("-inf"), 1.0], r"'reward' returned -inf for completion 0"),
        ([1.0, "2"], r"'reward' returned '2' for completion 1"),
        *(([1.0, value], r"'reward' returned -?(1e\+39|10+|inf) for completion 1")
          for value in (1e39, -1e39, 10**50, math.inf)),
        (1.0, r"'reward' returned float: return a list of numbers"),
        (None, r"'reward' returned NoneType: return a list of numbers"),
        ("12", r"'reward' returned str"),
        (torch.tensor(1.0), r"'reward' returned Tensor: return a list of numbers"),
    ],
)  # fmt: skip
def test_wrong_return_value_is_an_error(values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score(returning(values))


def test_reward_that_raises_is_named_with_its_cause() -> None:
    def broken(completions: Any, **columns: Any) -> list[float]:
        raise KeyError("level")

    with pytest.raises(RuntimeError, match=r"'broken' raised KeyError: 'level'.*2 comp") as error:
        score(length, broken)
    assert isinstance(error.value.__cause__, KeyError)


def test_missing_column_is_named_before_anything_is_sampled() -> None:
    def graded(completions: Any, completion_ids: Any, level: Any, unit: Any = None, **columns: Any):  # noqa: ANN202
        return [0.0] * len(completions)

    with pytest.raises(ValueError, match=r"'level', but the data has \['answer', 'problem'\]"):
        RewardSum([length, graded]).check_columns(["problem", "answer"])
    with pytest.raises(ValueError, match=r"but evaluation\.sets\.held has \['answer'\]"):
        RewardSum([graded]).check_columns(["answer"], "evaluation.sets.held")
    RewardSum([length, graded]).check_columns(["level"])
    with pytest.raises(ValueError, match="'graded' needs the column 'level'"):
        score(graded, answer=["1", "2"])


@pytest.mark.parametrize(
    ("function", "missing", "enough"),
    [
        (MathReward(), "'answer' or 'ground_truth' or 'solution'", ["solution"]),
        (ExactMatch("gold"), "'gold'", ["gold"]),
        (RegexMatch("(.)", column="key"), "'key'", ["key", "answer"]),
    ],
)  # fmt: skip
def test_columns_that_an_object_declares_are_required(
    function: RewardFunction, missing: str, enough: list[str]
) -> None:
    with pytest.raises(ValueError, match=f"needs the column {missing}, but"):
        RewardSum([function]).check_columns(["problem"])
    RewardSum([function]).check_columns(enough)


def test_column_of_another_length_is_an_error() -> None:
    with pytest.raises(ValueError, match="column 'answer' has 1 values for 2 completions"):
        score(length, answer=["4"])
    with pytest.raises(ValueError, match="column 'prompts' has 1 values for 2 completions"):
        RewardSum([length]).score(["?"], ["a", "b"], {})


@pytest.mark.parametrize(
    ("functions", "weights", "message"),
    [
        ([length, even], [1.0], "1 reward weights for 2 reward functions"),
        ([length], [math.nan], r"finite numbers, got \[nan\]"),
        ([], None, "rewards is empty"),
    ],
)
def test_weights_must_fit_the_functions(functions: Any, weights: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RewardSum(functions, weights)


def test_repeated_names_are_made_distinct() -> None:
    names = RewardSum([length, ExactMatch(), partial(length), length, ExactMatch]).names
    assert names == ["length", "ExactMatch", "length#2", "length#3", "ExactMatch#2"]


def test_failures_are_those_of_the_last_call() -> None:
    class Judge:
        failures = 0

        def __call__(self, completions: Any) -> list[float]:
            self.failures = sum(text == "?" for text in completions)
            return [0.0] * len(completions)

    rewards = RewardSum([length, Judge()])
    assert rewards.score(["", ""], ["?", "?"], {}).failures == {"length": 0, "Judge": 2}
    assert rewards.score(["", ""], ["?", "a"], {}).failures == {"length": 0, "Judge": 1}


def test_rewards_can_be_sent_to_another_process() -> None:
    rewards = [MathReward(), ExactMatch("gold"), RegexMatch(r"= (\d)")]
    copies = RewardSum(pickle.loads(pickle.dumps(rewards)))
    columns = {"answer": ["2"], "gold": ["= 2"]}
    assert copies.score(["1 + 1"], ["= 2"], columns).total.tolist() == [0.0 + 1.0 + 1.0]


@pytest.mark.parametrize(
    ("given", "check"),
    [
        ("prl_lightning.rewards.MathReward", lambda reward: isinstance(reward, MathReward)),
        (
            {"class_path": "prl_lightning.rewards.RegexMatch", "init_args": {"pattern": "(a)"}},
            lambda reward: reward.pattern.pattern == "(a)",
        ),
        ("operator.length_hint", lambda reward: reward is operator.length_hint),
    ],
)
def test_reward_is_given_in_yaml_by_path_or_class_path(
    given: Any, check: Callable[[Any], bool]
) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--rewards", type=list[Callable])
    rewards = parser.instantiate_classes(parser.parse_object({"rewards": [given]})).rewards
    assert check(RewardSum(rewards).functions[0])


def test_the_first_function_that_can_tells_answers_apart() -> None:
    def length(completions: list[str], **columns: Any) -> list[float]:
        return [0.0 for _ in completions]

    assert RewardSum([length]).answers([["a"]]) is None
    rewards = RewardSum([length, RegexMatch("(a)"), RegexMatch("(b)")])
    answers = rewards.answers([["a", "b", "a"], ["b"]])
    assert answers is not None
    assert answers.numbers == [[0, -1, 0], [-1]]


def test_without_limits_the_functions_are_warmed_up_here() -> None:
    class Broken:
        def __call__(self, completions: list[str]) -> list[float]:
            return [0.0 for _ in completions]

        def warm_up(self) -> None:
            raise RuntimeError("the verifier is broken")

    with pytest.raises(RuntimeError, match="the verifier is broken"):
        RewardSum([Broken()]).start()
