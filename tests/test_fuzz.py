"""Whatever comes in: a result or one clear error, never something else."""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from prl_lightning.cli import main
from prl_lightning.data import PromptDataModule
from prl_lightning.rewards import RegexMatch
from prl_lightning.rewards.match import number_answers, reference_texts, same_text
from prl_lightning.rewards.math import boxed_answer
from tiny_runs import ARITHMETIC, tiny_overrides

pytestmark = pytest.mark.process

LATEX = st.sampled_from(
    ["\\boxed{", "\\fbox{", "{", "}", "\\frac", "$", ",", " and ", "\\text{ or }", "\\", "1", "x=",
     "\\boxed", "(", ")", "\n", "\ud800", "\u202e", "٣"]
)  # fmt: skip
TEXTS = st.lists(LATEX | st.text(max_size=8), max_size=30).map("".join)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=50),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


EXAMPLES = int(os.environ.get("PRL_FUZZ", "40"))  # of what takes a moment each


def complaint(call: Callable[[], Any]) -> str | None:
    """The words of the one kind of error that bad input may end in."""
    try:
        call()
    except (ValueError, TypeError) as error:
        return str(error)
    return None


@settings(max_examples=500)
@given(TEXTS)
def test_a_boxed_answer_is_what_a_closed_box_holds(text: str) -> None:
    answer = boxed_answer(text)
    if answer is None:
        assert not any(text[i:].startswith(("\\boxed{}", "\\fbox{}")) for i in range(len(text)))
    else:
        assert "box" in text
        assert all(part.strip() in text for part in answer.split(", "))
        # A box around the whole holds the same, unless the text closes more than it opens.
        assert boxed_answer(text + "\\boxed{x}.") in ("x", f"{answer}, x")


@settings(max_examples=300)
@given(st.lists(TEXTS, max_size=6))
def test_answers_are_numbered_in_the_order_of_their_first(texts: list[str]) -> None:
    numbers = number_answers(texts, same_text)
    seen: list[int] = []
    for text, number in zip(texts, numbers, strict=True):
        assert (number == -1) == (text == "")
        if number >= 0 and number not in seen:
            assert number == len(seen)
            seen.append(number)


@settings(max_examples=300)
@given(VALUES)
def test_a_reference_is_texts_or_a_value_error(value: Any) -> None:
    said = complaint(lambda: reference_texts(value))
    if said is not None:
        assert "reference answer" in said
        return
    texts = reference_texts(value)
    assert texts
    assert all(isinstance(text, str) and text == text.strip() for text in texts)
    if isinstance(value, float):
        assert math.isclose(float(texts[0]), value)


@settings(max_examples=200)
@given(TEXTS, TEXTS)
def test_a_pattern_takes_any_text(text: str, reference: str) -> None:
    column = [reference or None]
    (reward,) = RegexMatch(r"boxed\{(\w*)\}")(["?"], [text], answer=column)
    assert reward in (None, 0.0, 1.0)


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    rows=st.lists(st.dictionaries(st.sampled_from(["prompt", "answer", "x"]), VALUES), max_size=4)
)
@example(rows=[{"prompt": "1", "x": [{"": None, "\x00": None}]}])
def test_rows_are_prompts_or_a_clear_error(rows: Any, tied_model: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    lines = [json.dumps(row, ensure_ascii=True) for row in rows]
    file.write_text("\n".join(lines))
    data = PromptDataModule(tied_model, train=str(file), prompts_per_epoch=1)
    said = complaint(lambda: data.setup("fit"))
    if said is None:
        assert all(prompt.token_ids for prompt in data.next_prompts())
    else:
        # The file or the field of it, and what is wrong with it.
        assert re.search(r"rows\.jsonl|data: (a row's|the) prompt|data\.\w+=", said), said


LONG = 100_000


@pytest.mark.parametrize("unit", ["1", "\\boxed{", "{", "}", "\\boxed{1}", "\\frac", "\n", "٣"])
def test_a_megabyte_is_answered_in_seconds(unit: str) -> None:
    text = unit * (2**20 // len(unit))
    since = time.monotonic()
    answer = boxed_answer(text)
    number_answers([text, text + "1", answer or ""], same_text)
    RegexMatch(r"boxed\{(\w*)\}")(["?"], [text], answer=["1"])
    assert time.monotonic() - since < 20
    if unit == "\\boxed{1}":
        assert answer is not None
        assert set(answer) <= set("1, ")


@pytest.mark.parametrize("prompt", ["1" * LONG, "\ud83d" * LONG, "\x00" * LONG, "٣" * LONG])
def test_a_row_of_any_length_is_a_prompt_or_left_out(
    prompt: str, tied_model: str, tmp_path: Path
) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": prompt, "answer": "1"}, {"prompt": "1+1=", "answer": "1" * LONG}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = PromptDataModule(tied_model, train=str(file), prompts_per_epoch=1)
    said = complaint(lambda: data.setup("fit"))
    if said is None:
        (prompt,) = data.next_prompts()
        assert prompt.source == "1+1="
        assert len(prompt.columns["answer"]) == LONG
    else:  # half a surrogate is no text; of another the tokenizer knows nothing
        assert "rows.jsonl" in said


SETTINGS = [
    "rollout.temperature", "evaluation.pass_at", "model.objective.beta", "model.objective.kl",
    "model.objective.steps", "model.objective.clip_low", "model.objective.aggregation",
    "model.optimizer", "data.prompts_per_epoch", "data.group_size", "data.updates_per_epoch",
    "evaluation.samples", "data.max_prompt_tokens", "data.format", "data.eval",
    "rollout.max_new_tokens", "rollout.limits.seconds", "rollout.limits", "rollout.reward_weights",
    "rollout.rewards", "rollout.overlap", "evaluation.top_p", "completions.groups",
    "guard.max_skipped", "trainer.max_epochs", "trainer.accumulate_grad_batches", "rollout.sampler",
    "no.such", "model.no_such", "trainer.callbacks",
]  # fmt: skip
WORDS = st.sampled_from(
    ["0", "-1", "1", "3", "1e9", ".nan", ".inf", "null", "true", "[]", "{}", "word", "[1, 64]",
     "{class_path: no.such.Thing}", "{a: 1}", "'", "os.system", "[null]", "1.5"]
)  # fmt: skip


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(changes=st.dictionaries(st.sampled_from(SETTINGS), WORDS, min_size=1, max_size=3))
@example(changes={"trainer.accumulate_grad_batches": "0"})
@example(changes={"model.optimizer": "{a: 1}", "data.group_size": "word"})
def test_a_configuration_fits_or_says_what_does_not(
    changes: dict[str, str], tied_model: str, tmp_path: Path
) -> None:
    words = [f"--{name}={value}" for name, value in changes.items()]
    args = ["check", f"--config={ARITHMETIC}", *tiny_overrides(tied_model, tmp_path), *words]
    said = complaint(lambda: main(args))
    # By its name as a field: "eval" alone would be found in "evaluation".
    fields = [re.escape(name.split(".")[-1]) for name in changes]
    assert said is None or re.search(rf"(?<![\w])({'|'.join(fields)})(?![\w])", said), said
