"""Commands and programs in README, docs and configurations work as they are printed there."""

from __future__ import annotations

import ast
import re
import shlex
import sys
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
import torch
import yaml
from lightning.fabric import Fabric
from lightning.pytorch.loggers import CSVLogger

from prl_lightning.cli import main
from prl_lightning.cli.lightning import CheckCLI, command_line
from prl_lightning.sampling import HFSampler
from tiny_runs import ARITHMETIC, fit, metrics_of, tiny_overrides, write_prompts

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DOCS = [file.read_text() for file in sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", "\n".join([README, *DOCS]), re.DOTALL)
# `prl check` reads these commands' arguments as the run would; the other commands have other tests.
CHECKED = {"fit", "validate", "check"}
ELSEWHERE = {
    "configs": "tests/test_packaging.py",
    "export": "tests/models/test_export.py",
    "new": "tests/test_cli.py",
    "predict": "tests/callbacks/test_completion_log.py",
    "report": "tests/report/",
}

ON_GPUS = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="Lightning's fsdp needs a CUDA GPU"),
)


def commands() -> list[str]:
    """Every whole line with a ``prl`` command, in code blocks and configurations' comments."""
    texts = [text for _, text in BLOCKS]
    texts += [file.read_text() for file in sorted((ROOT / "configs").rglob("*.yaml"))]
    joined = "\n".join(texts).replace("\\\n", " ")  # a command over several lines
    lines = re.findall(r"^(?:#|) *(prl [a-z].*)$", joined, re.MULTILINE)
    whole = (line.split("  #")[0].split(" # ")[0].strip() for line in lines)
    return sorted({line for line in whole if "..." not in line})


def python_block(words: str) -> str:
    (block,) = (text for kind, text in BLOCKS if kind == "python" and words in text)
    return str(block)


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 200


def test_every_command_is_run_somewhere() -> None:
    words = {command.split()[1] for command in commands()}
    assert words <= CHECKED | set(ELSEWHERE)
    assert all((ROOT / place).exists() for place in ELSEWHERE.values())


def sections_of(words: list[str]) -> dict[str, dict[str, Any]]:
    """A command's data and evaluation sections, later configurations over earlier ones."""
    sections: dict[str, dict[str, Any]] = {"data": {}, "evaluation": {}}
    for flag, value in zip(words, words[1:], strict=False):
        if flag == "--config":
            config = yaml.safe_load((ROOT / value).read_text())
            for name, section in sections.items():
                section |= config.get(name, {})
    return sections


def rows_in_columns(file: Path, columns: dict[str, str | list[str]]) -> Path:
    """Write two rows in the columns that a configuration expects."""
    write_prompts(file, count=2)
    for name, theirs in columns.items():
        first = theirs if isinstance(theirs, str) else theirs[0]
        file.write_text(file.read_text().replace(f'"{name}"', f'"{first}"'))
    return file


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(command, marks=ON_GPUS if "/fsdp.yaml" in command else ())
        for command in commands()
        if command.split()[1] in CHECKED
    ],
)
def test_a_command_is_understood(
    command: str, tied_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tiny model and a few rows replace the Hub's; everything else is the document's."""
    monkeypatch.chdir(ROOT)
    # A run folder's configuration is the one that the run was started with.
    words = shlex.split(re.sub(r"runs/(\w+)/version_0/config", r"configs/\1", command))[2:]
    sections = sections_of(words)
    columns = sections["data"].get("format", {}).get("columns", {})
    rows = rows_in_columns(tmp_path / "rows.jsonl", columns)
    sets = ", ".join(f"{name}: {rows}" for name in sections["evaluation"]["sets"])
    main(
        [
            "check",
            *words,
            f"--model.policy={tied_model}",
            "--data.prepare=null",
            f"--data.train={rows}",
            f"--evaluation.sets={{{sets}}}",
            "--data.max_prompt_tokens=32",
            "--rollout.max_new_tokens=64",
            f"--trainer.default_root_dir={tmp_path / 'run'}",
        ]
    )


@pytest.mark.parametrize("block", [text for kind, text in BLOCKS if kind == "yaml"])
def test_a_configuration_is_understood(
    block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its sections, names and types, on top of a configuration of ours."""
    for module, name in re.findall(r"\b(my_\w+)\.(\w+)", block):
        monkeypatch.delitem(sys.modules, module, raising=False)
        with (tmp_path / f"{module}.py").open("a") as file:
            file.write(f"def {name}(*args, **kwargs): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "block.yaml").write_text(block)
    over = ["--config", str(ARITHMETIC), "--config", str(tmp_path / "block.yaml")]
    config = command_line([*over, "--trainer.accelerator=cpu"], CheckCLI, run=False).config
    for section, values in yaml.safe_load(block).items():
        assert set(values) <= set(vars(config[section]))


@pytest.mark.parametrize("block", [text for kind, text in BLOCKS if kind == "python"])
def test_a_program_is_python_and_imports_what_exists(block: str) -> None:
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("prl_lightning"):
            for alias in node.names:
                resolve_name(f"{node.module}:{alias.name}")


def test_the_python_program_trains(tied_model: str, tmp_path: Path) -> None:
    """README's program, with a tiny model, two epochs and no engine."""
    program = python_block("trainer.fit(")
    changes = {
        '"Qwen/Qwen2.5-0.5B-Instruct"': repr(tied_model),
        '{"heldout": "heldout.jsonl"}': '{"heldout": train}',
        "temperature=1.0)": "temperature=1.0, sampler=sampler, max_new_tokens=8)",
        "max_epochs=100": "max_epochs=2, accelerator='cpu', enable_progress_bar=False",
        "accumulate_grad_batches=64": "accumulate_grad_batches=2",
        'CSVLogger("runs", name="own")': "logger",
        'train="train.jsonl",': "train=train, prompts_per_epoch=4, max_prompt_tokens=16,",
    }
    for old, new in changes.items():
        assert program.count(old) == 1, old
        program = program.replace(old, new)
    logger = CSVLogger(tmp_path, name="run")
    train = str(write_prompts(tmp_path / "train.jsonl"))
    exec(program, {"logger": logger, "train": train, "sampler": HFSampler()})
    metrics = metrics_of(tmp_path)
    assert len(metrics["train/loss"]) == 2
    assert "val/heldout/mean@16" in metrics
    assert (tmp_path / "run" / "version_0" / "checkpoints" / "last.ckpt").is_file()


def test_the_fabric_program_learns() -> None:
    program: dict[str, Any] = {}
    exec(python_block("Fabric()"), program)
    rewards = program["train"](Fabric(accelerator="cpu", devices=1), updates=40)
    assert sum(rewards[:5]) / 5 < 0.3
    assert sum(rewards[-5:]) / 5 > 0.5


def test_a_custom_reward_and_divergence_are_found_in_the_working_folder(
    tied_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = python_block("def short_enough") + python_block("register_divergence(")
    (tmp_path / "my_rewards.py").write_text(program)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)  # of another test
    fit(
        *tiny_overrides(tied_model, tmp_path),
        "--rollout.rewards=[sample_rewards.even_digits, my_rewards.short_enough]",
        "--rollout.reward_weights=[1.0, 0.1]",
        "--model.objective.divergence=chi_square",
        "--trainer.max_epochs=2",
    )
    metrics = metrics_of(tmp_path)
    assert metrics["rollout/reward/short_enough"] == [1.0, 1.0]
    # Chi-square's term of a token, f - f'u = 1 - u^2, is 0 while policy and reference agree. After
    # an update they differ.
    assert abs(metrics["train/process_term_mean"][0]) < 1e-6
    assert metrics["train/process_term_mean"][1] != 0
