import random
from collections import Counter
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prl_lightning.arithmetic import Problem, draw_problems

DIGITS = st.integers(0, 9)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    operators = draw(st.lists(st.sampled_from("+-*"), min_size=1, max_size=6))
    count = len(operators) + 1
    digits = draw(st.lists(DIGITS, min_size=count, max_size=count))
    return Problem(tuple(digits), tuple(operators), draw(st.sampled_from([10, 100])))


def evaluate(prompt: str, modulus: int = 10) -> list[int]:
    """Results from left to right, read from the prompt's text alone."""
    text = prompt.removesuffix("?")
    value, results = int(text[0]), []
    for op, digit in zip(text[1::2], text[2::2], strict=True):
        value = {"+": value + int(digit), "-": value - int(digit), "*": value * int(digit)}[op]
        value -= value // modulus * modulus
        results.append(value)
    return results


def steps(trace: str) -> list[tuple[str, int]]:
    """(left side, result) of every line but the last."""
    lines = [line.split("=") for line in trace.split("\n")[:-1]]
    return [(left, int(result)) for left, result in lines]


@settings(deadline=None)
@given(problems())
def test_a_right_trace_is_the_evaluation_of_its_prompt(problem: Problem) -> None:
    results = evaluate(problem.prompt, problem.modulus)
    trace = problem.trace(0.0, random.Random(0))
    assert [result for _, result in steps(trace)] == results
    assert problem.answer == str(results[-1])


@settings(deadline=None)
@given(problems(), st.floats(0, 1), st.integers(0, 100))
def test_each_step_continues_from_the_last_result(problem: Problem, rate: float, seed: int) -> None:
    """Right or wrong, with the operations of the prompt."""
    trace = problem.trace(rate, random.Random(seed))
    written = steps(trace)
    before = [problem.prompt[0], *(str(result) for _, result in written)]
    rest = problem.prompt.removesuffix("?")[1:]
    lefts = [f"{value}{rest[2 * i : 2 * i + 2]}" for i, value in enumerate(before[:-1])]
    assert [left for left, _ in written] == lefts
    assert trace.endswith(f"\n\\boxed{{{before[-1]}}}")


def errors(rate: float) -> list[int]:
    """By how much each step of many traces is wrong."""
    rng = random.Random(1)
    return [
        (result - evaluate(left)[0]) % 10
        for problem in islice(draw_problems(3, 5, seed=2), 3000)
        for left, result in steps(problem.trace(rate, rng))
    ]


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.25, 1.0])
def test_steps_are_wrong_as_often_as_asked(rate: float) -> None:
    found = errors(rate)
    wrong = sum(error != 0 for error in found) / len(found)
    assert abs(wrong - rate) <= 4 * (rate * (1 - rate) / len(found)) ** 0.5


def test_errors_are_uniform_over_the_nine_other_digits() -> None:
    counts = Counter(errors(1.0))
    expected = sum(counts.values()) / 9
    assert sorted(counts) == list(range(1, 10))
    # Pearson's statistic with 8 degrees of freedom; above 33 in one of 17,000 cases.
    assert sum((count - expected) ** 2 / expected for count in counts.values()) < 33


def test_problems_are_distinct_within_the_limits_and_a_function_of_the_seed() -> None:
    drawn, again, other, larger = (
        list(islice(draw_problems(2, 4, seed, modulus), 2000))
        for seed, modulus in ((5, 10), (5, 10), (6, 10), (5, 100))
    )
    assert len({problem.prompt for problem in drawn}) == 2000
    assert drawn == again != other
    assert [p.prompt for p in larger] == [p.prompt for p in drawn]
    assert max(int(p.answer) for p in larger) > 90
    lengths = Counter(len(problem.operators) for problem in drawn)
    assert sorted(lengths) == [2, 3, 4]
    assert all(abs(count - 2000 / 3) < 4 * (2000 * 2 / 9) ** 0.5 for count in lengths.values())
    assert {op for problem in drawn for op in problem.operators} == set("+-*")


def test_drawing_ends_where_there_are_no_more_problems() -> None:
    """10 x 10 digits x 3 operators; asking for more would otherwise never return."""
    assert len({problem.prompt for problem in draw_problems(1, 1, seed=0)}) == 300
