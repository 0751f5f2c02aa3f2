import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prl_lightning.data import sources
from prl_lightning.data.format import PromptFormat
from prl_lightning.data.sources import PromptSet, Source

from .tokenizers import CHAT_TEMPLATE, character_tokenizer

Rows = list[dict[str, Any]]
ROWS: Rows = [{"prompt": "1+1?", "answer": "2"}, {"prompt": "2+3?", "answer": "5"}]
CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "1+1?"},
]
EVALUATION_SETS = Path(__file__).parents[3] / "shared" / "data" / "eval"


def write(file: Path, rows: Rows) -> str:
    if file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows))
    else:
        schema = None if rows else pa.schema([("prompt", pa.string())])
        pq.write_table(pa.Table.from_pylist(rows, schema), file)
    return str(file)


def prompt_set(
    path: str,
    form: PromptFormat = PromptFormat(),  # noqa: B008  (frozen)
    chat_template: str | None = None,
    max_prompt_tokens: int = 100,
) -> PromptSet:
    tokenizer = character_tokenizer(chat_template)
    return PromptSet(Source(path), form, tokenizer, max_prompt_tokens, "data.train")


def rendered(form: PromptFormat, source: Any, chat_template: str | None = None) -> str:
    tokenizer = character_tokenizer(chat_template)
    return str(tokenizer.decode(form.render(source, tokenizer)))


# Files


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.parquet"])
def test_text_prompts_are_read_from_every_format(tmp_path: Path, name: str) -> None:
    prompts = prompt_set(write(tmp_path / name, ROWS))
    assert [(prompts[row].source, prompts[row].columns) for row in range(len(prompts))] == [
        ("1+1?", {"answer": "2"}),
        ("2+3?", {"answer": "5"}),
    ]
    tokenizer = character_tokenizer()
    assert prompts[1].token_ids == [0, *tokenizer.convert_tokens_to_ids(list("2+3?"))]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_verl_rows_give_their_ground_truth_as_the_answer(tmp_path: Path, name: str) -> None:
    row = {
        "data_source": "math",
        "prompt": CHAT[:1],
        "reward_model": {"style": "rule", "ground_truth": "2"},
    }
    prompt = prompt_set(write(tmp_path / name, [row]), chat_template=CHAT_TEMPLATE)[0]
    assert prompt.source == row.pop("prompt")
    assert prompt.columns == row | {"answer": "2", "ground_truth": "2"}
    own = {"prompt": "1+1?", "answer": "two", "reward_model": {"ground_truth": "2"}}
    assert prompt_set(write(tmp_path / "own.jsonl", [own]))[0].columns["answer"] == "two"


ANSWERS = {
    "math500": "solution", "minerva_math": "answer", "olympiad_bench": "answer",
    "aime24": "answer", "amc23": "answer",
}  # fmt: skip


@pytest.mark.parametrize(("name", "column"), ANSWERS.items())
def test_the_papers_evaluation_sets_load(name: str, column: str) -> None:
    file = EVALUATION_SETS / f"{name}.jsonl"
    if not file.is_file():
        pytest.skip(f"the evaluation sets of the papers are not at {EVALUATION_SETS}")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    form = PromptFormat(columns={"prompt": "problem", "answer": column})
    prompts = prompt_set(str(file), form, max_prompt_tokens=100_000)
    assert len(prompts) == len(lines)
    for row in (0, len(lines) - 1):
        assert prompts[row].source == lines[row]["problem"]
        assert prompts[row].columns["answer"] == lines[row][column]


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("/a/b/c/train.parquet", Source("/a/b/c/train.parquet")),
        ("gsm8k", Source("gsm8k")),
        ("openai/gsm8k:test", Source("openai/gsm8k", split="test")),
        ("openai/gsm8k/main", Source("openai/gsm8k", name="main")),
        ("openai/gsm8k/main:test[:50]", Source("openai/gsm8k", name="main", split="test[:50]")),
    ],
)
def test_the_short_form_of_a_source(text: str, source: Source) -> None:
    assert Source.parse(text) == source


@pytest.mark.parametrize("name", ["folder", "rows.csv"])
def test_a_local_path_is_not_a_name_on_the_hub(tmp_path: Path, name: str) -> None:
    there = tmp_path / name
    there.touch() if "." in name else there.mkdir()
    assert Source.parse(str(there)) == Source(str(there))


# Columns


TWO = {"prompt": "q", "answer": "a"}
SEVERAL = {"prompt": ["p", "q"], "answer": ["a", "s"]}


@pytest.mark.parametrize(
    ("columns", "row", "answer"),
    [
        (TWO, {"q": "1+1?", "a": "2", "level": 3}, {"answer": "2", "level": 3}),
        ({"prompt": "q"}, {"prompt": "old", "q": "1+1?"}, {}),
        (SEVERAL, {"p": "1+1?", "a": "2", "s": "It is 2."}, {"answer": "2", "s": "It is 2."}),
        (SEVERAL, {"q": "1+1?", "s": "2"}, {"answer": "2"}),
        (
            {"prompt": "answer", "answer": "prompt"},
            {"prompt": "2", "answer": "1+1?"},
            {"answer": "2"},
        ),
    ],
    ids=["others are kept", "replaces one", "first name", "second name", "swapped"],
)
def test_columns_are_renamed(
    columns: Any, row: dict[str, Any], answer: dict[str, Any], tmp_path: Path
) -> None:
    prompt = prompt_set(write(tmp_path / "rows.jsonl", [row]), PromptFormat(columns=columns))[0]
    assert (prompt.source, prompt.columns) == ("1+1?", answer)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, r"data\.train \(.*rows\.jsonl\).*'prompt'.*\['a', 'q'\].*data\.format\.columns"),
        ({"prompt": "q", "answer": ["gold", "best"]}, "'gold' or 'best'.*{answer: "),
        ({"prompt": "q", "answer": "q"}, r"data\.format\.columns=.*'q'"),
    ],
)
def test_missing_and_repeated_columns_are_errors(
    columns: Any, message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "rows.jsonl", [{"q": "1+1?", "a": "2"}])
    with pytest.raises(ValueError, match=message):
        prompt_set(path, PromptFormat(columns=columns))


# Rendering, by hand


THINKING = "{{ messages[0].content }}{% if not think %}!{% endif %}"
SYSTEM = {"system_prompt": "Think.", "template": "Q: {prompt}"}
OWN_SYSTEM = [{"role": "system", "content": "Own."}, *CHAT[2:]]


@pytest.mark.parametrize(
    ("options", "source", "chat_template", "expected"),
    [
        ({}, "1+1?", None, "<s>1+1?"),
        ({"template": "{prompt}{prompt}\n"}, "1+1?", None, "<s>1+1?1+1?\n"),
        ({"template": "{prompt}!"}, "{x} {prompt}", None, "<s>{x} {prompt}!"),
        (SYSTEM, "1+1?", None, "<s>Think.\n\nQ: 1+1?"),
        ({}, "1+1?", CHAT_TEMPLATE, "<s>[user]1+1?[assistant]"),
        ({"chat_template": False}, "1+1?", CHAT_TEMPLATE, "<s>1+1?"),
        ({"chat_template_args": {"think": False}}, "1+1?", THINKING, "1+1?!"),
        (
            SYSTEM,
            CHAT,
            CHAT_TEMPLATE,
            "<s>[system]Think.[user]Hi[assistant]Yes?[user]Q: 1+1?[assistant]",
        ),
        (SYSTEM, OWN_SYSTEM, CHAT_TEMPLATE, "<s>[system]Own.[user]Q: 1+1?[assistant]"),
    ],
)
def test_a_prompt_is_rendered(
    options: dict[str, Any], source: Any, chat_template: str | None, expected: str
) -> None:
    before = json.dumps(source)
    assert rendered(PromptFormat(**options), source, chat_template) == expected
    assert json.dumps(source) == before


@pytest.mark.parametrize(
    ("options", "source", "chat_template", "message"),
    [
        ({}, CHAT, None, r"data\.format\.chat_template"),
        ({"chat_template": True}, "1+1?", None, r"data\.format\.chat_template"),
        ({}, None, CHAT_TEMPLATE, r" None, .*data\.format\.columns"),
        ({}, 3, CHAT_TEMPLATE, r" 3, .*data\.format\.columns"),
        ({}, [], CHAT_TEMPLATE, r" \[\], .*data\.format\.columns"),
        ({"template": "Solve:"}, "1+1?", None, r"data\.format\.template='Solve:'.*{prompt}"),
    ],
)
def test_a_prompt_that_cannot_be_rendered_is_an_error(
    options: dict[str, Any], source: Any, chat_template: str | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        rendered(PromptFormat(**options), source, chat_template)


# Limits


def test_too_long_prompts_are_dropped_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages: list[str] = []
    monkeypatch.setattr(sources, "rank_zero_info", messages.append)
    rows = [{"prompt": "1" * length, "answer": str(length)} for length in (4, 5, 3, 9)]
    path = write(tmp_path / "rows.jsonl", rows)
    prompts = prompt_set(path, max_prompt_tokens=5)  # "<s>" is one of the five
    assert [prompts[row].columns["answer"] for row in range(len(prompts))] == ["4", "3"]
    assert len(prompt_set(path, max_prompt_tokens=10)) == 4
    (message,) = messages
    assert "data.train: 2 of 4 prompts" in message
    assert "data.max_prompt_tokens=5" in message
    with pytest.raises(ValueError, match=r"data\.max_prompt_tokens=3.* 4 tokens"):
        prompt_set(path, max_prompt_tokens=3)


# Errors


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("rows.json", "[]", r"rows\.json'.* no rows"),
        ("rows.jsonl", "", r"rows\.jsonl'.* no rows"),
        ("rows.jsonl", '{"prompt": "1+1?"}\n{"prompt": \n', r"rows\.jsonl'.* json: .*JSON"),
        ("rows.csv", "prompt,answer\n1+1?,2\n", r"rows\.csv'.*\.json, \.jsonl, \.parquet"),
    ],
)
def test_a_file_without_readable_rows_is_named(
    name: str, text: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        Source(str(tmp_path / name)).load()


def test_an_empty_table_and_a_missing_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rows\.parquet'.* no rows"):
        Source(write(tmp_path / "rows.parquet", [])).load()
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl"):
        Source(str(tmp_path / "nowhere.jsonl")).load()
    with pytest.raises(ValueError, match=r"rows\.parquet:test"):
        Source(str(tmp_path / "rows.parquet"), split="test").load()
