"""The pages for users of TRL and verl: the names of our options, and the examples as printed."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from jsonargparse import Namespace

from prl_lightning.cli.lightning import CheckCLI, command_line
from prl_lightning.models.loading import load_tokenizer
from prl_lightning.runs.tables import read_table
from tiny_runs import ARITHMETIC, fit, metrics_of, write_prompts

pytestmark = pytest.mark.process

DOCS = ARITHMETIC.parents[1] / "docs"
PAGES = {name: (DOCS / f"from_{name}.md").read_text() for name in ("trl", "verl")}
SECTIONS = "model|data|evaluation|rollout|trainer"


@pytest.mark.parametrize("peer", PAGES)
def test_our_options_exist(peer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The names in the last column of the table of options."""
    monkeypatch.chdir(ARITHMETIC.parents[1])
    table = PAGES[peer].partition("\n## Options")[2].partition("\n## ")[0]
    ours = " ".join(line.split(" | ")[-1] for line in table.splitlines())
    names = set(re.findall(rf"`((?:{SECTIONS})(?:\.\w+)+)", ours))
    assert len(names) > 25
    flags = [f"--config={ARITHMETIC}", "--trainer.accelerator=cpu", "--model.lora={r: 2}"]
    config = command_line(flags, CheckCLI, run=False).config
    assert {name for name in names if not exists(config, name)} == set()


def exists(config: Namespace, name: str) -> bool:
    """A section's object, such as ``model.objective``, has its fields in the configuration."""
    section, _, key = name.rpartition(".")
    values = config[section]
    return key in vars(values.init_args if "init_args" in values else values)


def block(peer: str, kind: str, words: str) -> str:
    blocks = re.findall(rf"```{kind}\n(.*?)```", PAGES[peer], re.DOTALL)
    (found,) = (text for text in blocks if words in text)
    return str(found)


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any) -> Any:
    """Of the user's file: a mix-up of columns, rows or completions changes the score."""
    score = len(solution_str) + 100 * int(ground_truth) + 10_000 * extra_info.get("index", 7)
    return {"score": score, "acc": 1.0} if data_source == "math" else float(score)


SCORES = f"from {__name__} import compute_score"


def verl_rows(folder: Path) -> Path:
    """Of two sources, one without a value in ``extra_info``."""
    rows = [
        {
            "data_source": "math" if number % 2 else "code",
            "prompt": [{"role": "user", "content": f"{number}+1="}],
            "reward_model": {"style": "rule", "ground_truth": str(number + 1)},
            "extra_info": {"split": "train", "index": number} if number else None,
        }
        for number in range(8)
    ]
    Dataset.from_list(rows).to_parquet(folder / "train.parquet")
    return folder / "train.parquet"


def trl_rows(folder: Path) -> Path:
    file = write_prompts(folder / "train.jsonl")
    text = re.sub(r'"answer": "(\d+)"', r'"answer": "so #### \1"', file.read_text())
    file.write_text(text.replace('"prompt"', '"question"'))
    return file


def expected_of_verl(row: dict[str, Any]) -> float:
    number = int(re.findall(r"(\d)\+1=", row["prompt"])[-1])
    extra = {"index": number} if number else {}
    score = compute_score("code", row["completion"], str(number + 1), extra)
    return float(score)


def expected_of_trl(row: dict[str, Any]) -> float:
    first, second = re.findall(r"\d+", row["prompt"])[-2:]
    found = re.findall(r"\d+", row["completion"])
    sign = -1 if "-" in row["completion"] else 1
    return float(bool(found) and sign * int(found[-1]) == int(first) + int(second))


EXAMPLES: dict[str, tuple[Callable[[Path], Path], Callable[[dict[str, Any]], float], str]] = {
    "trl": (trl_rows, expected_of_trl, "my_rewards"),
    "verl": (verl_rows, expected_of_verl, "my_verl_rewards"),
}


@pytest.mark.parametrize("peer", EXAMPLES)
def test_the_example_of_a_page_trains(
    peer: str, tied_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their data and their reward function, with the page's configuration and a tiny model."""
    write, expected, module = EXAMPLES[peer]
    rows, config = write(tmp_path), tmp_path / "run.yaml"
    config.write_text(block(peer, "yaml", "prompts_per_epoch"))
    (tmp_path / f"{module}.py").write_text(block(peer, "python", f"# {module}.py"))
    (tmp_path / "my_scores.py").write_text(SCORES)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)  # of another test
    fit(*tiny(chat_model(tied_model, tmp_path), rows, tmp_path, peer), config=config)
    folder = tmp_path / "run" / "version_0"
    samples = read_table(folder / "completions" / "epoch=00000.parquet")
    assert len(samples) == 16
    for row in samples:
        assert row["reward"] == expected(row), row
    assert len(metrics_of(tmp_path)["train/loss"]) == 2


def test_the_reward_function_for_trl_reads_the_last_number() -> None:
    program: dict[str, Any] = {}
    exec(block("trl", "python", "# my_rewards.py"), program)
    texts = ["so 2 x 617 is 1,234", "1234, or 12", "nothing", "-1234"]
    assert program["last_number"](texts, ["#### 1234"] * 4, prompts=texts) == [1.0, 0.0, 0.0, 0.0]


def chat_model(model: str, folder: Path) -> str:
    """verl's prompts are chats."""
    shutil.copytree(model, folder / "chat")
    tokenizer = load_tokenizer(model)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder / "chat")
    return str(folder / "chat")


def tiny(model: str, rows: Path, folder: Path, peer: str) -> list[str]:
    """What makes a page's configuration a run of seconds."""
    sets = ["--evaluation.sets={test: " + str(rows) + "}", "--evaluation.samples=2"]
    return [
        f"--model.policy={model}",
        f"--data.train={rows}",
        "--data.prompts_per_epoch=4",
        "--data.group_size=4",
        "--rollout.sampler=HFSampler",
        "--rollout.max_new_tokens=8",
        f"--trainer.default_root_dir={folder / 'run'}",
        "--trainer.max_epochs=2",
        "--trainer.accumulate_grad_batches=2",
        "--trainer.precision=32-true",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        *((*sets, "--evaluation.pass_at=[2]") if peer == "verl" else ()),
    ]
