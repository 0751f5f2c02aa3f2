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
EVALUATION_SETS = Path(__file__).parents[3] / "shared" / "data" / "eval"


def write(file: Path, rows: Rows) -> str:
    if file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), file)
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
    assert [prompts[row].source for row in range(len(prompts))] == ["1+1?", "2+3?"]
    assert [prompts[row].columns for row in range(len(prompts))] == [
        {"answer": "2"},
        {"answer": "5"},
    ]
    tokenizer = character_tokenizer()
    assert prompts[1].token_ids == [0, *tokenizer.convert_tokens_to_ids(list("2+3?"))]
    assert prompts.column_names == {"answer"}


def test_chat_prompts_keep_their_messages_for_the_rewards(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "1+1?"}]
    path = write(tmp_path / "rows.jsonl", [{"prompt": messages, "answer": "2"}])
    prompt = prompt_set(path, PromptFormat(template="Solve {prompt}"), CHAT_TEMPLATE)[0]
    assert prompt.source == messages
    text = character_tokenizer().decode(prompt.token_ids)
    assert text == "<s>[user]Solve 1+1?[assistant]"


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_verl_rows_give_their_ground_truth_as_the_answer(tmp_path: Path, name: str) -> None:
    row = {
        "data_source": "math",
        "prompt": [{"role": "user", "content": "1+1?"}],
        "reward_model": {"style": "rule", "ground_truth": "2"},
    }
    prompt = prompt_set(write(tmp_path / name, [row]), chat_template=CHAT_TEMPLATE)[0]
    assert prompt.columns["answer"] == prompt.columns["ground_truth"] == "2"
    assert prompt.columns["data_source"] == "math"
    assert prompt.columns["reward_model"] == row["reward_model"]


def test_an_answer_beside_verls_reward_model_is_kept(tmp_path: Path) -> None:
    row = {"prompt": "1+1?", "answer": "two", "reward_model": {"ground_truth": "2"}}
    assert prompt_set(write(tmp_path / "rows.jsonl", [row]))[0].columns["answer"] == "two"


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("math500", "solution"),
        ("minerva_math", "answer"),
        ("olympiad_bench", "answer"),
        ("aime24", "answer"),
        ("amc23", "answer"),
    ],
)
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
        ("data/train.jsonl", Source("data/train.jsonl")),
        ("/a/b/c/train.parquet", Source("/a/b/c/train.parquet")),
        ("gsm8k", Source("gsm8k")),
        ("openai/gsm8k", Source("openai/gsm8k")),
        ("openai/gsm8k:test", Source("openai/gsm8k", split="test")),
        ("openai/gsm8k/main", Source("openai/gsm8k", name="main")),
        ("openai/gsm8k/main:test[:50]", Source("openai/gsm8k", name="main", split="test[:50]")),
    ],
)
def test_the_short_form_of_a_source(text: str, source: Source) -> None:
    assert Source.parse(text) == source


@pytest.mark.parametrize("name", ["folder", "rows.csv"])
def test_what_is_there_is_not_taken_for_a_name_on_the_hub(tmp_path: Path, name: str) -> None:
    there = tmp_path / name
    there.touch() if "." in name else there.mkdir()
    assert Source.parse(str(there)) == Source(str(there))


# Columns


def test_columns_are_mapped_and_others_are_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"problem": "1+1?", "solution": "2", "level": 3}])
    form = PromptFormat(columns={"prompt": "problem", "answer": "solution"})
    prompt = prompt_set(path, form)[0]
    assert (prompt.source, prompt.columns) == ("1+1?", {"answer": "2", "level": 3})


def test_a_mapped_column_replaces_one_of_its_name(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"prompt": "old", "problem": "new"}])
    prompt = prompt_set(path, PromptFormat(columns={"prompt": "problem"}))[0]
    assert (prompt.source, prompt.columns) == ("new", {})


def test_of_several_names_the_first_that_is_there_is_taken(tmp_path: Path) -> None:
    form = PromptFormat(
        columns={"prompt": ["problem", "question"], "answer": ["answer", "solution"]}
    )
    worked = {"problem": "1+1?", "answer": "2", "solution": "It is 2."}
    prompt = prompt_set(write(tmp_path / "a.jsonl", [worked]), form)[0]
    assert (prompt.source, prompt.columns) == ("1+1?", {"answer": "2", "solution": "It is 2."})
    prompt = prompt_set(write(tmp_path / "b.jsonl", [{"question": "1+1?", "solution": "2"}]), form)[
        0
    ]
    assert (prompt.source, prompt.columns) == ("1+1?", {"answer": "2"})
    with pytest.raises(
        ValueError, match=r"no column 'answer' or 'solution'; it has \['question'\]"
    ):
        prompt_set(write(tmp_path / "c.jsonl", [{"question": "1+1?"}]), form)


def test_two_columns_can_change_places(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"prompt": "2", "answer": "1+1?"}])
    prompt = prompt_set(path, PromptFormat(columns={"prompt": "answer", "answer": "prompt"}))[0]
    assert (prompt.source, prompt.columns) == ("1+1?", {"answer": "2"})


# Rendering, by hand


@pytest.mark.parametrize(
    ("form", "chat_template", "expected"),
    [
        (PromptFormat(), None, "<s>1+1?"),
        (PromptFormat(template="Q: {prompt}\nA:"), None, "<s>Q: 1+1?\nA:"),
        (PromptFormat(template="{prompt}{prompt}"), None, "<s>1+1?1+1?"),
        (PromptFormat(system_prompt="Think."), None, "<s>Think.\n\n1+1?"),
        (
            PromptFormat(system_prompt="Think.", template="{prompt} In \\boxed{}."),
            None,
            "<s>Think.\n\n1+1? In \\boxed{}.",
        ),
        (PromptFormat(), CHAT_TEMPLATE, "<s>[user]1+1?[assistant]"),
        (PromptFormat(chat_template=False), CHAT_TEMPLATE, "<s>1+1?"),
        (
            PromptFormat(chat_template_args={"enable_thinking": False}),
            "{{ messages[0].content }}{% if not enable_thinking %}!{% endif %}",
            "1+1?!",
        ),
        (
            PromptFormat(system_prompt="Think.", template="Q: {prompt}"),
            CHAT_TEMPLATE,
            "<s>[system]Think.[user]Q: 1+1?[assistant]",
        ),
    ],
)
def test_a_text_prompt_is_rendered(
    form: PromptFormat, chat_template: str | None, expected: str
) -> None:
    assert rendered(form, "1+1?", chat_template) == expected


def test_a_chat_prompt_is_rendered_with_the_template_around_its_last_message() -> None:
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "1+1?"},
    ]
    form = PromptFormat(system_prompt="Think.", template="Q: {prompt}")
    expected = "<s>[system]Think.[user]Hi[assistant]Yes?[user]Q: 1+1?[assistant]"
    assert rendered(form, messages, CHAT_TEMPLATE) == expected
    # The data's messages are as they were.
    assert messages[2]["content"] == "1+1?"
    assert len(messages) == 3


def test_braces_of_a_problem_are_not_a_template() -> None:
    assert rendered(PromptFormat(template="{prompt}!"), "{x} {prompt}") == "<s>{x} {prompt}!"


# Limits


def test_too_long_prompts_are_left_out_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages: list[str] = []
    monkeypatch.setattr(sources, "rank_zero_info", messages.append)
    rows = [{"prompt": "1" * length, "answer": str(length)} for length in (4, 5, 3, 9)]
    path = write(tmp_path / "rows.jsonl", rows)
    prompts = prompt_set(path, max_prompt_tokens=5)  # "<s>" is one of the five
    assert [prompts[row].columns["answer"] for row in range(len(prompts))] == ["4", "3"]
    (message,) = messages
    assert "data.train: 2 of 4 prompts" in message
    assert "data.max_prompt_tokens=5" in message
    messages.clear()
    assert len(prompt_set(path, max_prompt_tokens=10)) == 4
    assert not messages


def test_only_too_long_prompts_are_an_error_with_the_shortest(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(ValueError, match=r"data\.max_prompt_tokens=4; the shortest has 5"):
        prompt_set(path, max_prompt_tokens=4)


# Errors


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    path = str(tmp_path / "nowhere.jsonl")
    with pytest.raises(FileNotFoundError) as error:
        Source(path).load()
    assert path in str(error.value)


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_an_empty_file_is_named(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, [])
    with pytest.raises(ValueError, match="has no rows") as error:
        Source(path).load()
    assert path in str(error.value)


def test_an_empty_parquet_file_is_named(tmp_path: Path) -> None:
    path = str(tmp_path / "rows.parquet")
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), path)
    with pytest.raises(ValueError, match="has no rows") as error:
        Source(path).load()
    assert path in str(error.value)


def test_a_broken_file_is_named_with_the_cause(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "1+1?"}\n{"prompt": \n')
    with pytest.raises(ValueError, match=r"read as json: .*JSON") as error:
        Source(str(file)).load()
    assert str(file) in str(error.value)


def test_a_file_of_another_format_is_not_looked_for_on_the_hub(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("prompt,answer\n1+1?,2\n")
    with pytest.raises(ValueError, match=r"rows\.csv.*\.json, \.jsonl, \.parquet"):
        Source(str(file)).load()


def test_a_missing_column_is_named_with_those_there_are(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"problem": "1+1?", "solution": "2"}])
    with pytest.raises(ValueError, match="no column 'prompt'") as error:
        prompt_set(path)
    for part in (path, "data.train", "['problem', 'solution']", "data.format.columns"):
        assert part in str(error.value)
    with pytest.raises(ValueError, match="no column 'gold'.*{answer: "):
        prompt_set(path, PromptFormat(columns={"prompt": "problem", "answer": "gold"}))


def test_a_column_mapped_twice_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"problem": "1+1?"}])
    with pytest.raises(ValueError, match=r"data\.format\.columns=.*twice"):
        prompt_set(path, PromptFormat(columns={"prompt": "problem", "answer": "problem"}))


def test_a_template_without_the_problem_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"data\.format\.template='Solve:' lacks '{prompt}'"):
        PromptFormat(template="Solve:")


@pytest.mark.parametrize(
    ("form", "source"),
    [
        (PromptFormat(), [{"role": "user", "content": "1+1?"}]),
        (PromptFormat(chat_template=True), "1+1?"),
    ],
    ids=["messages", "chat_template is true"],
)
def test_a_chat_without_a_chat_template_is_an_error(form: PromptFormat, source: Any) -> None:
    with pytest.raises(ValueError, match=r"tokenizer has no chat template\. Use"):
        rendered(form, source)


@pytest.mark.parametrize("source", [None, 3, []], ids=str)
def test_a_row_without_a_prompt_says_what_it_holds(source: Any) -> None:
    with pytest.raises(ValueError, match="prompt is neither text nor chat messages") as error:
        rendered(PromptFormat(), source, CHAT_TEMPLATE)
    assert repr(source) in str(error.value)
