import json
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM

from prl_lightning.arithmetic import (
    ArithmeticTask,
    Problem,
    SumsTask,
    base_model,
    draw_problems,
    make_tokenizer,
)
from prl_lightning.models.loading import stop_token_ids
from prl_lightning.runs import progress

TINY = ArithmeticTask(
    folder="", train_problems=40, heldout_problems=10, base_steps=2, hidden_size=32, layers=1
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> ArithmeticTask:
    task = replace(TINY, folder=str(tmp_path_factory.mktemp("arithmetic") / "deep" / "task"))
    assert not task.is_made()
    before = torch.get_rng_state()
    task()
    assert torch.equal(torch.get_rng_state(), before)  # the run that needs the folder goes on
    return task


@pytest.fixture
def instant(monkeypatch: pytest.MonkeyPatch, tied_model: str) -> None:
    """No training: any model will do."""
    model = Qwen2ForCausalLM.from_pretrained(tied_model)
    monkeypatch.setattr(base_model, "train_base_model", lambda *_, **__: model)


@pytest.fixture
def task(tmp_path: Path, instant: None) -> ArithmeticTask:
    return replace(TINY, folder=str(tmp_path / "task"))


def rows(folder: str, name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (Path(folder) / name).read_text().splitlines()]


def siblings(folder: str) -> list[str]:
    return [path.name for path in Path(folder).parent.iterdir()]


def test_the_folder_is_complete(made: ArithmeticTask) -> None:
    assert made.is_made()
    train, heldout = rows(made.folder, "train.jsonl"), rows(made.folder, "heldout.jsonl")
    assert (len(train), len(heldout)) == (40, 10)
    prompts = [{row["prompt"] for row in part} for part in (train, heldout)]
    assert (len(prompts[0]), len(prompts[1])) == (40, 10)
    assert not prompts[0] & prompts[1]
    for row in train + heldout:
        text = row["prompt"].removesuffix("?")
        problem = Problem(tuple(map(int, text[::2])), tuple(text[1::2]))
        assert (row["prompt"], row["answer"]) == (problem.prompt, problem.answer)
    assert siblings(made.folder) == ["task"]


def test_the_base_model_loads_with_the_same_ids(made: ArithmeticTask) -> None:
    base = str(Path(made.folder) / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    ids = make_tokenizer()("3+5*2?3+5=8\n8*2=6\n\\boxed{6}<eos>")["input_ids"]
    assert model.config.vocab_size == len(tokenizer) == len(make_tokenizer())
    assert (model.config.hidden_size, model.config.num_hidden_layers) == (32, 1)
    assert stop_token_ids(base, tokenizer) == (tokenizer.eos_token_id,)
    assert model(torch.tensor([ids])).logits.isfinite().all()


def test_a_folder_that_is_made_is_kept(
    made: ArithmeticTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ArithmeticTask, "make", None)
    made()
    assert not any(
        replace(made, **change).is_made()
        for change in ({"seed": 1}, {"base_steps": 3}, {"error_rate": 0.5})
    )


def test_a_folder_of_other_settings_is_made_anew(task: ArithmeticTask) -> None:
    Path(task.folder).mkdir()  # an empty folder is used
    task.make()
    first = rows(task.folder, "train.jsonl")
    other = replace(task, seed=1)
    other()
    assert other.is_made()
    assert not task.is_made()
    assert rows(task.folder, "train.jsonl") != first
    assert siblings(task.folder) == ["task"]


@pytest.mark.parametrize("where", ["training", "saving", "problems", "last file"])
def test_an_interrupted_run_leaves_nothing_that_looks_finished(
    task: ArithmeticTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    task.make()

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    write_text = Path.write_text

    def interrupt_last(file: Path, *args: Any, **options: Any) -> int:
        if file.name == "task.json":
            raise KeyboardInterrupt
        return write_text(file, *args, **options)

    target: tuple[Any, str, Callable[..., Any]] = {
        "training": (base_model, "train_base_model", interrupt),
        "saving": (Qwen2ForCausalLM, "save_pretrained", interrupt),
        "problems": (json, "dumps", interrupt),
        "last file": (Path, "write_text", interrupt_last),
    }[where]
    monkeypatch.setattr(*target)
    for new in (replace(task, seed=1), replace(task, folder=str(tmp_path / "fresh"))):
        with pytest.raises(KeyboardInterrupt):
            new.make()
        assert not new.is_made()
    assert task.is_made()
    assert siblings(task.folder) == ["task"]


def test_a_folder_with_something_else_is_not_replaced(task: ArithmeticTask, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match=f"folder='{tmp_path}'"):
        replace(task, folder=str(tmp_path)).make()
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_more_problems_than_there_are_is_an_error(task: ArithmeticTask) -> None:
    few = replace(task, min_operations=1, max_operations=1, train_problems=291)
    with pytest.raises(ValueError, match=r"train_problems=291 .*300"):
        few.make()
    replace(few, train_problems=290).make()


# What the base model is trained on


def test_labels_are_the_trace_and_its_end_alone() -> None:
    tokenizer = make_tokenizer()
    problems = [Problem((3, 5), ("+",)), Problem((1, 2, 3, 4), ("+", "*", "-"))]
    traces = base_model.trace_batches(problems, tokenizer, error_rate=0.0, batch_size=8, seed=0)
    input_ids, labels = next(traces)
    right = {
        "3+5?": "3+5=8\n\\boxed{8}<eos>",
        "1+2*3-4?": "1+2=3\n3*3=9\n9-4=5\n\\boxed{5}<eos>",
    }
    prompts = set()
    for ids, own in zip(input_ids, labels, strict=True):
        learnt = own != base_model.IGNORED
        assert torch.equal(ids[learnt], own[learnt])
        prompt, _, _ = tokenizer.decode(ids).partition("?")
        prompts.add(prompt)
        assert tokenizer.decode(ids[learnt]) == right[f"{prompt}?"]
    assert len(prompts) == 2


def test_a_file_gets_lines_of_the_training_and_no_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line a minute: none in a moment, one for each step if a minute were no time at all."""
    problems = list(islice(draw_problems(3, 3, 0), 4))
    for seconds in (progress.LINE_SECONDS, 0.0):
        monkeypatch.setattr(progress, "LINE_SECONDS", seconds)
        base_model.train_base_model(problems, make_tokenizer(), hidden_size=32, layers=1, steps=2)
        lines = capsys.readouterr().err.splitlines()
        assert [line.partition(" after ")[0] for line in lines] == [
            f"Base model: {step} of 2" for step in ((1, 2) if seconds == 0 else ())
        ]


def test_training_learns_the_traces() -> None:
    """The loss of a token falls from a uniform guess of 22 tokens to less than half."""
    problems, tokenizer = list(islice(draw_problems(1, 1, 0), 300)), make_tokenizer()
    input_ids, labels = next(base_model.trace_batches(problems, tokenizer, 0.0, 64, seed=1))
    losses = []
    for steps in (1, 60):
        model = base_model.train_base_model(
            problems, tokenizer, 0.0, hidden_size=32, layers=1, steps=steps, learning_rate=1e-2
        )
        losses.append(model(input_ids=input_ids, labels=labels).loss.item())
    assert losses[1] < losses[0] / 2


def test_sums_are_those_of_ordinary_arithmetic(tmp_path: Path, instant: None) -> None:
    task = SumsTask(str(tmp_path / "sums"))
    task.make()
    parts = [rows(task.folder, name) for name in ("train.jsonl", "heldout.jsonl")]
    assert [len(part) for part in parts] == [321, 64]
    answers = {row["prompt"]: row["answer"] for part in parts for row in part}
    assert len(answers) == 385  # each once, in one of the parts
    for prompt, answer in answers.items():
        assert str(eval(prompt.rstrip("?"))) == answer
    assert set(answers.values()) == set("0123456789")
