import json
import re
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from prl_lightning.rewards import ExactMatch, MathReward
from prl_lightning.rewards.match import reference_texts
from prl_lightning.rewards.math import boxed_answer

# The papers' evaluation sets, where a checkout has them beside it.
EVALUATION = Path(__file__).parents[2].parent / "shared/data/eval"
ROWS = {"math500": 500, "minerva_math": 272, "olympiad_bench": 675, "aime24": 30, "amc23": 40}
needs_data = pytest.mark.skipif(
    not EVALUATION.is_dir(), reason=f"the evaluation sets are not at {EVALUATION}"
)


def judge(completion: Any, reference: Any) -> tuple[float | None, int]:
    reward = MathReward()
    (value,) = reward(["?"], [completion], answer=[reference])
    return value, reward.failures


@pytest.mark.parametrize(
    ("boxed", "reference"),
    [
        ("5", "5"), ("27", 27.0), (r"\frac{1}{2}", 0.5), (r"\frac{2}{4}", r"\frac12"),
        (r"\dfrac{1}{2}", r"$\frac{1}{2}$"), ("33", "033"), ("1234", "1,234"), ("x=5", "5"),
        (r"5 \text{ cm}", "5"), (r"90^\circ", "90"), ("(x+1)(x-1)", "x^2-1"), ("3,1,2", "1, 2, 3"),
        (r"\{3, 1\}", r"$1$,$3$"), (r"(-\infty, 2)", r"(-\infty,2)"),
        (r"\text{Evelyn}", r"\text{ Evelyn }"), (r"\frac{2}{3}", ["1", r"$\frac{2}{3}$"]),
        (r"\frac{10}{2}", [r"\int_0^1 x dx", "5"]),  # the first cannot be judged
        (r"4.5 \times 10^{33}", "4.5e+33"),
        ("72", "Half of 48 is 24.\n48+24 = <<48+24=72>>72.\n#### 72"),
        ("1.6", r"Start with $s=\frac{1}{2}$, so that $s=\boxed{1.6}$ cm"),
        (r"4.5 \times 10^{33}", "4.5e33"), (r"3.61\times10^{-10}", "3.61e-10"),
        ("0.0000000045", r"4.5 \times 10^{-9}"), ("0.00000010000001", "0.0000001"), ("e-1", "e-1"),
        ("2e - 1", "-1+2e"), (r"-\frac{1}{3}", "-1./3"), ("n^2-n-1", r"$m_{\max }=n^{2}-n-1$"),
        (r"62.5\%", "62.5%"),
    ],
)  # fmt: skip
def test_equal_answers_score_one(boxed: str, reference: Any) -> None:
    assert judge(rf"So it is $\boxed{{{boxed}}}$.", reference) == (1.0, 0)


@pytest.mark.parametrize(
    ("boxed", "reference"),
    [
        ("6", "5"), ("5.001", "5"), ("5x", "5"), ("5+1", "5"), ("-5", "5"), ("55", "5"),
        ("1,2", "1,2,3"), ("(2,1)", "(1,2)"), ("[1,2]", "(1,2)"), (r"\text{west}", r"\text{east}"),
        (r"4.5 \times 10^{32}", "4.5e33"),
        ("0.000000045", "0.0000000045"),  # equal to math-verify, which rounds to six places
        (r"1.2\times10^{-19}", "2.9e-19"),
        ("0.0000001001", "0.0000001"),  # 1e-3 of its size away
        ("0.0000104", "0.00001"), ("0.0010004", "0.001"), ("0", "0.0000001"),
        (r"\frac{1}{3} E_{1}+\frac{2}{3} E_{2}", r"\frac{2}{3}"),  # it can read a part of it
        ("", "5"), ("  ", "5"),
    ],
)  # fmt: skip
def test_other_answers_score_zero(boxed: str, reference: Any) -> None:
    assert judge(rf"So it is $\boxed{{{boxed}}}$.", reference) == (0.0, 0)


@pytest.mark.parametrize(
    "completion",
    [
        "", "5", "The final answer is $5$. I hope", "####5", r"\boxed{5", r"\boxed{\frac{5}{1}",
        "{5}",
    ],
)  # fmt: skip
def test_answer_outside_a_closed_box_scores_zero(completion: Any) -> None:
    assert judge(completion, "5") == (0.0, 0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\boxed{1} no, \boxed{2}", "2"), (r"\boxed{1}. Again: \boxed{3", "1"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"$\boxed{1}$ and $\boxed{2}$", "1, 2"),
        (r"$x=\boxed{1}$, $x=\boxed{2}$ or $x=\boxed{3}$", "1, 2, 3"),
        (r"\boxed{1} \text{ or } \boxed{2}", "1, 2"), (r"\boxed{1}; \boxed{2}", "1, 2"),
        (r"\boxed{2}, \boxed{2}", "2"), (r"\boxed{9} \boxed{1}, \boxed{2}", "1, 2"),
        (r"\fbox{3}", "3"), (r"\boxed {4}", "4"), (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{\left\{x=1\right.}", r"\left\{x=1\right."), (r"\boxed{a \\}", r"a \\"),
        ("no box", None), (r"So it is $\boxed 2$.", "2"), (r"\boxed12", "12"),
        (r"\boxed -3.5.", "-3.5"),
        (r"$\boxed\frac{1}{2}$", r"\frac{1}{2}"), (r"\boxed 2, \boxed{3}", "2, 3"),
        (r"$\boxed A$", "A"), (r"\boxed{5} and \boxed", "5"), (r"\boxed{5} so \boxed{}", ""),
    ],
)  # fmt: skip
def test_boxed_answer(text: str, expected: Any) -> None:
    assert boxed_answer(text) == expected


@pytest.mark.parametrize(
    ("completion", "whole", "after_reasoning"),
    [
        (r"<think>\boxed{5}</think> It is \boxed{5}", 1.0, 1.0),
        (r"<think>\boxed{4}</think> It is \boxed{5}", 1.0, 1.0),
        (r"<think>\boxed{5}</think> It is five", 1.0, 0.0),
        (r"<think>It is \boxed{5}", 1.0, 0.0),
        (r"It is \boxed{5}", 1.0, 0.0),
        (r"</think>\boxed{5} so \boxed{}", 0.0, 0.0),
    ],
)
def test_boxes_within_the_reasoning(completion: str, whole: float, after_reasoning: float) -> None:
    """TRL's accuracy_reward judges the whole text, its reasoning_accuracy_reward the rest."""
    for reward, value in ((MathReward(), whole), (MathReward("</think>"), after_reasoning)):
        assert reward(["?"], [completion], answer=["5"]) == [value]
        assert (reward.answers([completion])[0] >= 0) == (value == 1.0)


def test_columns_in_the_order_of_the_conventions() -> None:
    reward, two = MathReward(), [r"\boxed{2}"]
    assert reward(["?"], two, ground_truth=["2"], solution=["3"]) == [1.0]
    assert reward(["?"], two, answer=["3"], ground_truth=["2"], level=[1]) == [0.0]
    assert reward(["?"], two, solution=[r"so \boxed{2}"]) == [1.0]
    chat = [{"role": "assistant", "content": r"\boxed{2}"}]
    assert reward([[{"role": "user", "content": "?"}]], [chat], answer=["2"]) == [1.0]
    with pytest.raises(ValueError, match=r"'answer', 'ground_truth' and 'solution'.*\['gold'\]"):
        reward(["?"], two, gold=["2"])


@pytest.mark.parametrize("reward", [MathReward(), ExactMatch()])
def test_references_are_checked(reward: Any) -> None:
    with pytest.raises(ValueError, match="shorter"):
        reward(["?", "?"], ["1", "2"], answer=["1"])
    assert reward(["?"], [r"\boxed{2}"], answer=[None]) == [None]
    with pytest.raises(ValueError, match="reference answer ''"):
        reward(["?"], [r"\boxed{2}"], answer=[""])


@pytest.mark.parametrize(
    "absurd",
    [
        "9^{9^{9^9}}", "2^{9999999999}", r"\int_0^1 e^{x^2}\sin(x^3)\,dx",
        r"\sum_{k=1}^{100000}\frac{1}{k^2}", r"\prod_{k=1}^{100000}k",
        r"\lim_{x\to0}\frac{\sin x}{x}", r"\oint_C x\,dx", "2^{-9999999}", "100000!", "1000000!",
        "(" * 11 + "1" + ")" * 11, "1+" * 200 + "1",
    ],
)  # fmt: skip
def test_answer_that_would_take_minutes_is_a_counted_failure(absurd: str) -> None:
    start = time.process_time()
    assert judge(rf"\boxed{{{absurd}}}", "5") == (0.0, 1)
    assert time.process_time() - start < 1.0


@pytest.mark.parametrize(
    ("large", "reference"),
    [
        ("2^{100000}/2^{99999}", "2"), ("99999!/99998!", "99999"), ("(" * 10 + "1" + ")" * 10, "1"),
        ("1+" * 199 + "01", "200"),  # 400 characters
    ],
)  # fmt: skip
def test_answers_just_within_the_limits_are_judged(large: str, reference: str) -> None:
    assert judge(rf"\boxed{{{large}}}", reference) == (1.0, 0)


def test_failures_and_errors_are_those_of_the_last_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that is too complex counts as a failure, and is no error."""
    reward = MathReward()
    assert reward(["?"], [r"\boxed{9^{9^{9}}}"], answer=["5"]) == [0.0]
    assert (reward.failures, reward.errors) == (1, [])
    monkeypatch.setattr("math_verify.verify", lambda *args, **kwargs: 1 / 0)
    completions = [r"\boxed{6}", r"\boxed{5}", "no box"]
    assert reward(["?"] * 3, completions, answer=[["5", "4"]] * 3) == [0.0, 1.0, 0.0]
    assert reward.failures == 1  # the others were decided without math-verify
    assert [type(error) for error in reward.errors] == [ZeroDivisionError]
    assert reward(["?"], [r"\boxed{5}"], answer=["5"]) == [1.0]
    assert (reward.failures, reward.errors) == (0, [])


def test_a_memory_error_is_not_a_wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(*args: Any, **kwargs: Any) -> bool:
        raise MemoryError

    monkeypatch.setattr("math_verify.verify", lacking)
    with pytest.raises(MemoryError):
        judge(r"\boxed{6}", "5")
    with pytest.raises(MemoryError):
        MathReward().answers([r"\boxed{6}", r"\boxed{5}"])


@pytest.mark.parametrize(
    ("verify", "trouble"),
    [(lambda *args, **kwargs: False, "different"), (lambda *args, **kwargs: 1 / 0, "ZeroDivision")],
)
def test_a_broken_math_verify_is_an_error_at_once(
    verify: Any, trouble: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("math_verify.verify", verify)
    with pytest.raises(RuntimeError, match=rf"'0.25' and .* equal.*{trouble}"):
        MathReward().warm_up()


def test_a_missing_math_verify_is_an_error_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ImportError):
        MathReward().warm_up()


def test_works_outside_the_main_thread() -> None:
    results = []
    thread = threading.Thread(target=lambda: results.append(judge(r"\boxed{\frac{4}{8}}", "0.5")))
    thread.start()
    thread.join()
    assert results == [(1.0, 0)]


def references(name: str) -> list[Any]:
    lines = (EVALUATION / f"{name}.jsonl").read_text().splitlines()
    return [json.loads(line)["answer"] for line in lines]


def boxed(reference: Any) -> str:
    (text,) = reference_texts(reference)
    return boxed_answer(text) or text


@needs_data
@pytest.mark.parametrize("name", ROWS)
def test_every_reference_of_the_evaluation_sets_equals_itself(name: str) -> None:
    answers = references(name)
    assert len(answers) == ROWS[name]
    reward = MathReward()
    # `\displaystyle` gets past the comparison of texts, to math-verify.
    for form in (r"\boxed{%s}", r"So it is \[\boxed{\displaystyle %s }.\]"):
        scores = reward(["?"] * len(answers), [form % boxed(a) for a in answers], answer=answers)
        assert [row for row, value in enumerate(scores) if value != 1.0] == []
        assert reward.failures == 0


# By set and perturbation, the rows whose altered answer math-verify accepts.
NOT_TO_BE_TOLD_APART = {
    # Choices (C), (E) and (B), whose letter is all that counts.
    ("math500", "plus_seven"): {227, 255, 296},
    ("math500", "digit"): {227, 255, 296},
    # Right all the same: choices, 0 and 0q, the whole answer or the right side of an equation.
    ("math500", "symbol"): {76, 179, 191, 204, 227, 255, 296, 317, 391, 406, 457},
    ("minerva_math", "symbol"): {62, 68, 89},
    ("olympiad_bench", "symbol"): {10, 73, 168, 400, 567, 603},
    # Of N = n + 7 it compares the right side with that of N = n, as equations in n.
    ("olympiad_bench", "plus_seven"): {122},
}


def wrongly_accepted(name: str, rows: slice, perturbation: str) -> set[int]:
    perturb = PERTURBATIONS[perturbation]
    golds = [(row, answer, boxed(answer).strip("$")) for row, answer in enumerate(references(name))]
    # The negative of zero is zero.
    chosen = [g for g in golds[rows] if perturbation != "negative" or not is_zero(g[2])]
    completions = [rf"\boxed{{{perturb(text)}}}" for _, _, text in chosen]
    scores = MathReward()(completions, completions, answer=[answer for _, answer, _ in chosen])
    accepted = {row for (row, _, _), value in zip(chosen, scores, strict=True) if value}
    return accepted - NOT_TO_BE_TOLD_APART.get((name, perturbation), set())


def is_zero(text: str) -> bool:
    return re.fullmatch(r"[0.]+", text) is not None


PERTURBATIONS = {
    "plus_one": lambda text: f"({text})+1",
    "plus_seven": lambda text: f"{text}+7",
    "negative": lambda text: f"-({text})",
    "digit": lambda text: f"{text}7",
    "symbol": lambda text: f"{text}q",
}


@needs_data
@pytest.mark.parametrize("name", ROWS)
def test_perturbed_references_score_zero(name: str) -> None:
    for perturbation in PERTURBATIONS:
        assert wrongly_accepted(name, slice(None, None, 25), perturbation) == set()


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize("perturbation", PERTURBATIONS)
@pytest.mark.parametrize("name", ROWS)
def test_every_perturbed_reference_scores_zero(name: str, perturbation: str) -> None:
    assert wrongly_accepted(name, slice(None), perturbation) == set()


def test_answers_are_numbered_by_value_and_not_by_text() -> None:
    texts = [r"\boxed{1/2}", r"\boxed{0.5}", r"\boxed{2}", r"half", r"\boxed{\frac{2}{4}}"]
    assert MathReward().answers([*texts, r"\boxed{ }", r"\boxed{2.0}"]) == [0, 0, 1, -1, 0, -1, 1]


def test_answers_that_cannot_be_compared_are_the_same_where_their_text_is() -> None:
    tower = r"\boxed{9^{9^{9}}}"
    assert MathReward().answers([tower, r"\boxed{9^{9^{8}}}", tower]) == [0, 1, 0]
