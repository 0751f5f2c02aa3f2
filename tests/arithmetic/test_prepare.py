import json
import shutil
import subprocess
import sys
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
    base_model,
    draw_problems,
    make_tokenizer,
)
from prl_lightning.models.loading import stop_token_ids

TINY = ArithmeticTask(
    folder="", train_problems=40, heldout_problems=10, base_steps=2, hidden_size=32, layers=1
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> ArithmeticTask:
    """Made as a run makes it, in a process of its own."""
    task = replace(TINY, folder=str(tmp_path_factory.mktemp("arithmetic") / "deep" / "task"))
    assert not task.is_made()
    task()
    return task


@pytest.fixture
def instant(monkeypatch: pytest.MonkeyPatch, tied_model: str) -> None:
    """No training: any model will do."""

    def load(*_: Any, **__: Any) -> Qwen2ForCausalLM:
        return Qwen2ForCausalLM.from_pretrained(tied_model)

    monkeypatch.setattr(base_model, "train_base_model", load)


def rows(folder: str, name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (Path(folder) / name).read_text().splitlines()]


def forbidden(*_: Any, **__: Any) -> None:
    raise AssertionError("made again")


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
    # Nothing is left beside it.
    assert [path.name for path in Path(made.folder).parent.iterdir()] == ["task"]


def test_the_base_model_loads_with_the_same_ids(made: ArithmeticTask) -> None:
    base = str(Path(made.folder) / "base")
    tokenizer, model = (
        AutoTokenizer.from_pretrained(base),
        AutoModelForCausalLM.from_pretrained(base),
    )
    text = "3+5*2?3+5=8\n8*2=6\n\\boxed{6}<eos>"
    ids = make_tokenizer()(text)["input_ids"]
    assert tokenizer(text)["input_ids"] == ids
    assert tokenizer.decode(ids) == text
    assert model.config.vocab_size == len(tokenizer) == len(make_tokenizer())
    assert (model.config.hidden_size, model.config.num_hidden_layers) == (32, 1)
    assert stop_token_ids(base, tokenizer) == (tokenizer.eos_token_id,)
    assert model(torch.tensor([ids])).logits.isfinite().all()


def test_a_folder_that_is_made_is_kept(
    made: ArithmeticTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", forbidden)
    before = {path: path.stat().st_mtime_ns for path in Path(made.folder).rglob("*")}
    made()
    assert {path: path.stat().st_mtime_ns for path in Path(made.folder).rglob("*")} == before


@pytest.mark.parametrize("change", [{"seed": 1}, {"base_steps": 3}, {"error_rate": 0.5}])
def test_other_settings_are_another_task(made: ArithmeticTask, change: dict[str, Any]) -> None:
    assert not replace(made, **change).is_made()


@pytest.mark.usefixtures("instant")
def test_a_folder_of_other_settings_is_made_anew(tmp_path: Path) -> None:
    folder = str(tmp_path / "task")
    replace(TINY, folder=folder).make()
    first = rows(folder, "train.jsonl")
    other = replace(TINY, folder=folder, seed=1)
    assert not other.is_made()
    other.make()
    assert other.is_made()
    assert not replace(TINY, folder=folder).is_made()
    assert rows(folder, "train.jsonl") != first
    assert [path.name for path in tmp_path.iterdir()] == ["task"]


@pytest.mark.parametrize("where", ["training", "saving", "problems", "last file"])
@pytest.mark.usefixtures("instant")
def test_an_interrupted_run_leaves_nothing_that_looks_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    folder = str(tmp_path / "task")
    old, new = replace(TINY, folder=folder), replace(TINY, folder=folder, seed=1)
    old.make()

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
    for task in (new, replace(new, folder=str(tmp_path / "fresh"))):
        with pytest.raises(KeyboardInterrupt):
            task.make()
        assert not task.is_made()
    # What was there is whole, and nothing else is.
    assert old.is_made()
    assert [path.name for path in tmp_path.iterdir()] == ["task"]


@pytest.mark.usefixtures("instant")
def test_a_folder_with_something_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"no arithmetic task\. Name another"):
        replace(TINY, folder=str(tmp_path)).make()
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.usefixtures("instant")
def test_an_empty_folder_is_used(tmp_path: Path) -> None:
    (tmp_path / "task").mkdir()
    task = replace(TINY, folder=str(tmp_path / "task"))
    task.make()
    assert task.is_made()


@pytest.mark.usefixtures("instant")
def test_more_problems_than_there_are_is_an_error(tmp_path: Path) -> None:
    few = replace(
        TINY, folder=str(tmp_path / "task"), min_operations=1, max_operations=1, train_problems=291
    )
    with pytest.raises(ValueError, match=r"train_problems=291 is more than the 300 problems of 1"):
        few.make()
    replace(few, train_problems=290).make()


def test_the_process_belongs_to_no_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank of a distributed run makes the folder alone."""
    seen: list[dict[str, str]] = []
    monkeypatch.setattr(subprocess, "run", lambda *_, env, **__: seen.append(env))
    monkeypatch.setenv("SURROUNDINGS", "kept")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    replace(TINY, folder=str(tmp_path / "task"))()
    (env,) = seen
    assert env["SURROUNDINGS"] == "kept"
    assert not {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} & set(env)


def test_a_failed_process_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A base model that was not made must not be looked for later."""
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(subprocess.CalledProcessError):
        replace(TINY, folder=str(tmp_path / "task"))()


# What the base model is trained on


def test_labels_are_the_trace_and_its_end_alone() -> None:
    tokenizer = make_tokenizer()
    problems = [Problem((3, 5), ("+",)), Problem((1, 2, 3, 4), ("+", "*", "-"))]
    traces = base_model._Traces(problems, tokenizer, error_rate=0.0, batch_size=8, seed=0)
    input_ids, labels = next(iter(traces))
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


def test_no_bar_of_the_training_is_drawn_into_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    problems = list(islice(draw_problems(3, 3, 0), 4))
    base_model.train_base_model(problems, make_tokenizer(), hidden_size=32, layers=1, steps=2)
    assert "Epoch" not in "".join(capsys.readouterr())
