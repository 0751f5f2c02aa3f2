import json
import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import processors

from prl_lightning.data.format import DataError, PromptFormat
from prl_lightning.data.prompt_set import PromptSet
from prl_lightning.data.sources import Source
from prl_lightning.rewards import ExactMatch
from prl_lightning.rewards.match import reference_texts
from prl_lightning.rewards.protocol import checked_rewards
from prl_lightning.runs.text import prompt_text

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
    nulls = [row | {"prompt": CHAT[:1]}, {"prompt": CHAT[:1], "reward_model": None}]
    nulls += [{"prompt": CHAT[:1], "reward_model": {"style": "rule", "ground_truth": None}}]
    prompts = prompt_set(write(tmp_path / f"nulls_{name}", nulls), chat_template=CHAT_TEMPLATE)
    assert [prompts[i].columns["answer"] for i in range(3)] == ["2", None, None]
    assert prompts.columns == prompts[1].columns.keys()
    own = {"prompt": "1+1?", "answer": "two", "reward_model": {"ground_truth": "2"}}
    assert prompt_set(write(tmp_path / "own.jsonl", [own]))[0].columns["answer"] == "two"


VALUES = [
    [5, "[2, 3]", "5", "null", "true", " 2 "],
    ["2024-01-05", "2023-12-31T10:00:00Z"],
    [2**63, -(2**64), 10**40, 0.1, 1e-7, -0.0],
    ["0012", 12, 1.0, True, False, None],
    [{"tests": [{"in": "2", "out": "null"}, {"in": 2}]}, {"tests": "[]"}, [["1", 1], {}]],
]


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "folder/rows.jsonl"])
@pytest.mark.parametrize("values", VALUES, ids=["lists", "dates", "numbers", "digits", "nested"])
def test_a_row_of_json_has_the_values_of_the_file(
    name: str, values: list[Any], tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    rows = [{"prompt": "1+1?", "answer": value} for value in values]
    path = Path(write(tmp_path / name, rows))
    prompts = prompt_set(str(path.parent if path.parent.name == "folder" else path))
    read = [prompts[row].columns["answer"] for row in range(len(values))]
    assert repr(read) == repr(values)  # 1, 1.0 and True are equal


def test_a_type_may_change_after_ten_megabytes(tmp_path: Path) -> None:
    rows = [{"prompt": "1+1?", "answer": "x" * 2**20, "only": 1} for _ in range(11)]
    rows.append({"prompt": "1+1?", "answer": 2})
    prompts = prompt_set(write(tmp_path / "rows.jsonl", rows))
    assert prompts[11].columns == {"answer": 2, "only": None}
    assert prompts[0].columns == {"answer": "x" * 2**20, "only": 1}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rows.jsonl", '\n{"prompt": "a\u2028b"}\n  \n\n{"prompt": "c"}'),
        ("rows.jsonl", '\ufeff{"prompt": "a\u2028b"}\r\n{"prompt": "c"}\r\n'),
        ("rows.jsonl", '[{"prompt": "a\u2028b"}, {"prompt": "c"}]'),
        ("rows.json", '{"prompt": "a\u2028b"}\n{"prompt": "c"}\n'),
        ("rows.json", '[\n {"prompt": "a\\u2028b"},\n {"prompt": "c"}\n]\n'),
        ("rows.json", '{\n "prompt": ["a\u2028b", "c"]\n}\n'),
        ("rows.json", '{\n "prompt": "a\u2028b"\n}\n{\n "prompt": "c"\n}\n'),
    ],
    ids=["blank lines", "Windows", "array", "lines", "indented", "columns", "several"],
)
def test_json_is_read_in_its_usual_forms(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(text.encode())
    rows = Source(str(tmp_path / name)).load()
    assert (
        [row["prompt"] for row in rows] == [row["prompt"] for row in rows[:]] == ["a\u2028b", "c"]
    )


@pytest.mark.parametrize("name", ["test.jsonl", "test.json"])
def test_a_split_of_json_files_may_be_cut(name: str, tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [{"prompt": "train"}])
    write(tmp_path / name, [{"prompt": f"{row}"} for row in range(4)])
    for split, rows in (("test[1:3]", "12"), ("test[:25%]+test[-1:]", "03"), ("test", "0123")):
        read = Source(str(tmp_path), split=split).load()
        assert [row["prompt"] for row in read] == list(rows)
    with pytest.raises(DataError, match="'?missing"):
        Source(str(tmp_path), split="missing").load()


def test_decimals_of_a_table_are_answers(tmp_path: Path) -> None:
    rows = [
        {"prompt": "1+1?", "answer": Decimal("2.50"), "all": [Decimal("1e2")]},
        {"prompt": "1+1?", "answer": Decimal("0.10"), "all": None},
    ]
    prompts = prompt_set(write(tmp_path / "rows.parquet", rows))
    answers = [prompts[row].columns["answer"] for row in range(2)]
    assert answers == [Decimal("2.50"), Decimal("0.10")]
    assert ExactMatch()(["?", "?"], ["2.5", ".1"], answer=answers) == [1.0, 1.0]
    assert [reference_texts(answer) for answer in answers] == [["2.5"], ["0.1"]]
    assert reference_texts(prompts[0].columns["all"]) == ["100"]
    assert checked_rewards("f", answers, 2) == [2.5, 0.1]


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


@pytest.mark.parametrize("name", ["run[v1]/a.jsonl", "a[!0].json", "[a]*?.parquet"])
def test_a_path_is_no_pattern(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "b[1]" / name
    file.parent.mkdir(parents=True)
    path = write(file, ROWS)
    assert len(prompt_set(path)) == 2
    monkeypatch.chdir(file.parent)
    assert len(prompt_set(file.name)) == 2


@pytest.mark.parametrize(("name", "mark"), [("run[v1]", r"'\['"), ("a::b.jsonl", "'::'")])
def test_a_path_that_cannot_be_read_is_named(name: str, mark: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.mkdir() if "." not in name else file.touch()
    with pytest.raises(DataError, match=f"{re.escape(name)}'.*{mark}.*Rename"):
        Source.parse(str(file)).check()


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
RENDERED = "<s>[user]1+1?[assistant]"
BEGUN = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "It is"}]
CALLED = [
    BEGUN[0],
    {"role": "assistant", "tool_calls": [{"name": "add", "arguments": None}]},
    {"role": "tool", "content": "2"},
]
NULLS = [
    {"role": "system", "content": [{"type": "text", "text": "Think."}], "tool_calls": None},
    {
        "role": "user",
        "content": [{"type": "text", "text": "1+"}, {"type": "text", "text": "1?", "image": None}],
        "tool_calls": [],
    },
]
# Like Llama 3's: it takes the key for a call, joins contents as texts, and closes every turn.
CLOSING = (
    "<s>{% for message in messages %}{% if 'tool_calls' in message %}"
    "{% if message.tool_calls | length != 1 %}{{ raise_exception('one call only') }}{% endif %}"
    "[{{ message.tool_calls[0].name }}]"
    "{% if 'arguments' in message.tool_calls[0] %}{{ raise_exception('null') }}{% endif %}"
    "{% else %}{{ '[' + message['role'] + ']' + message['content'] | trim }}{% endif %}"
    "</s>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
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
        ({}, RENDERED, None, RENDERED),
        ({}, RENDERED, CHAT_TEMPLATE, RENDERED),
        ({"chat_template": True}, "<s>1+1?", CHAT_TEMPLATE, "<s>[user]1+1?[assistant]"),
        (SYSTEM, "<s>1+1?", None, "<s>Think.\n\nQ: 1+1?"),
        ({}, "1<s>1?", None, "<s>1<s>1?"),
        ({}, BEGUN, CLOSING, "<s>[user]1+1?</s>[assistant]It is"),
        (SYSTEM, BEGUN, CLOSING, "<s>[system]Think.</s>[user]Q: 1+1?</s>[assistant]It is"),
        (
            {},
            [BEGUN[0], {"role": "assistant", "content": ""}],
            CLOSING,
            "<s>[user]1+1?</s>[assistant]",
        ),
        (
            SYSTEM,
            CALLED,
            CLOSING,
            "<s>[system]Think.</s>[user]Q: 1+1?</s>[add]</s>[tool]2</s>[assistant]",
        ),
        ({}, NULLS, CLOSING, "<s>[system]Think.</s>[user]1+1?</s>[assistant]"),
        ({}, [{"role": "system", "content": "1+1?"}], CLOSING, "<s>[system]1+1?</s>[assistant]"),
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
        ({}, [{"role": "user"}], CLOSING, "message 0 .*'user'.* content None"),
        ({}, [*CHAT, {"role": "tool", "content": None}], CLOSING, "message 3 .*'tool'.* None"),
        ({}, [{"role": "user", "content": [{"type": "image"}]}], CLOSING, "message 0 .*image"),
        ({}, [{"role": "user", "content": ["1+1?"]}], CLOSING, "message 0 .*1.1"),
        ({}, [{"from": "human", "value": "1+1?"}], CLOSING, "message 0 .*human.*'role'"),
        ({}, ["1+1?"], CLOSING, "message 0 .*1.1.*'role'"),
        ({}, [BEGUN[0], CALLED[1]], CLOSING, "content"),
        (SYSTEM, BEGUN[1:], CLOSING, r"'user'.*data\.format\.template='Q: {prompt}'"),
    ],
)
def test_a_prompt_that_cannot_be_rendered_is_an_error(
    options: dict[str, Any], source: Any, chat_template: str | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        rendered(PromptFormat(**options), source, chat_template)


@pytest.mark.parametrize("chat_template", [None, CHAT_TEMPLATE])
@pytest.mark.parametrize(
    ("single", "expected"),
    [
        ("$A </s>", "1+1?"), ("<s> $A </s>", "<s>1+1?"), ("<s> <s> $A", "<s><s>1+1?"),
        ("$A", "1+1?"),
    ],
)  # fmt: skip
def test_a_text_has_the_tokenizers_first_tokens_once_and_no_last_ones(
    single: str, expected: str, chat_template: str | None
) -> None:
    tokenizer = character_tokenizer(chat_template)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    form = PromptFormat(chat_template=False)
    assert tokenizer.decode(form.render("1+1?", tokenizer)) == expected
    rendered = expected if expected.startswith("<s>") else f"<s>{expected}"
    assert tokenizer.decode(form.render(rendered, tokenizer)) == rendered


REFUSING = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"


@pytest.mark.parametrize(
    ("row", "chat_template", "message"),
    [
        (
            {"prompt": [{"role": "system", "content": "Think."}]},
            REFUSING,
            "TemplateError: no system",
        ),
        ({"prompt": [{"role": "user"}]}, CHAT_TEMPLATE, "message 0 .*'user'"),
        ({"prompt": BEGUN}, "{{ messages[0].content }}", "ValueError: .*final message"),
        ({"prompt": BEGUN}, "{{ messages[1].content + 1 if messages[1] }}", "concatenate"),
        ({"prompt": None}, CHAT_TEMPLATE, "None"),
        ({"answer": "2"}, CHAT_TEMPLATE, "None"),
        ({"prompt": ""}, CHAT_TEMPLATE, "''"),
    ],
)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_a_row_that_cannot_be_rendered_is_named(
    name: str, row: dict[str, Any], chat_template: str, message: str, tmp_path: Path
) -> None:
    good = {"prompt": [{"role": "user", "content": "1+1?"}], "answer": "2"}
    path = write(tmp_path / name, [row] if row.get("prompt") == "" else [good, row])
    number = 0 if row.get("prompt") == "" else 1
    named = rf"data\.train \(.*rows\.\w+\), row {number}: .*{message}"
    with pytest.raises(DataError, match=rf"{named}[^\n]*$"):
        prompt_set(path, chat_template=chat_template)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_chats_of_tables_are_read_without_the_nulls_of_other_rows(
    name: str, tmp_path: Path
) -> None:
    called = {"role": "assistant", "tool_calls": [{"name": "add"}]}
    rows = [{"prompt": [CALLED[0], called, CALLED[2]]}, {"prompt": [BEGUN[0] | {"name": "Ann"}]}]
    prompts = prompt_set(write(tmp_path / name, rows), chat_template=CLOSING)
    assert [prompts[row].source for row in range(2)] == [row["prompt"] for row in rows]
    assert prompt_text(prompts[0].source) == "user: 1+1?\n\nassistant: \n\ntool: 2"
    parts = prompt_set(
        write(tmp_path / f"parts_{name}", [{"prompt": NULLS}]), chat_template=CLOSING
    )
    assert parts[0].source == [
        {"role": "system", "content": "Think."},
        {"role": "user", "content": "1+1?"},
    ]


# Limits


def test_too_long_prompts_are_dropped_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages: list[str] = []
    monkeypatch.setattr("prl_lightning.data.prompt_set.rank_zero_info", messages.append)
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
        ("rows.jsonl", '{"prompt": "1+1?"}\n3\n', r"rows\.jsonl'.* line 2 .*3"),
        ("rows.json", '[{"prompt": "1+1?"}, "1+1?"]', r"rows\.json'.* item 2 .*1\+1"),
        ("rows.json", '[{"prompt": "1+1?"}', r"rows\.json'.*JSON"),
        ("rows.jsonl", '{"prompt": "1+1?", "a": ["\\uD83D"]}', r"rows\.jsonl'.* line 1 .*ud83d"),
        ("rows.jsonl", '{"a": ' + "[" * 100_000, r"rows\.jsonl'.*JSON"),
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
