"""What README and the configurations tell a reader to type is understood as it stands there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger

from prl_lightning.cli import main
from prl_lightning.sampling import HFSampler
from runs import fit, metrics_of, tiny_overrides, write_prompts

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
# What `prl check` reads as the run itself would; the other words have tests of their own.
CHECKED = {"fit", "validate", "check"}
ELSEWHERE = {
    "configs": "tests/test_packaging.py",
    "export": "tests/test_export.py",
    "predict": "tests/callbacks/test_completion_log.py",
    "report": "tests/report/",
}

ON_GPUS = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="Lightning's fsdp needs a CUDA GPU"),
)


def commands() -> list[str]:
    """Every whole line with a ``prl`` command, in README's blocks and configurations' comments."""
    texts = [*re.findall(r"```\w*\n(.*?)```", README, re.DOTALL)]
    texts += [file.read_text() for file in sorted((ROOT / "configs").rglob("*.yaml"))]
    lines = re.findall(r"^(?:#|) *(prl [a-z].*)$", "\n".join(texts), re.MULTILINE)
    whole = (line.split("  #")[0].split(" # ")[0].strip() for line in lines)
    return sorted({line for line in whole if "..." not in line})


def python_block(words: str) -> str:
    blocks: list[str] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (block,) = (block for block in blocks if words in block)
    return block


def test_every_command_is_run_somewhere() -> None:
    words = {command.split()[1] for command in commands()}
    assert words <= CHECKED | set(ELSEWHERE)
    assert all((ROOT / place).exists() for place in ELSEWHERE.values())


def data_of(words: list[str]) -> dict[str, Any]:
    """The data section of a command's configurations, later ones over earlier ones."""
    data: dict[str, Any] = {}
    for flag, value in zip(words, words[1:], strict=False):
        if flag == "--config":
            data |= yaml.safe_load((ROOT / value).read_text()).get("data", {})
    return data


def rows_in_columns(file: Path, columns: dict[str, str | list[str]]) -> Path:
    """Two rows in the columns that a configuration expects."""
    write_prompts(file, count=2)
    for name, own in columns.items():
        first = own if isinstance(own, str) else own[0]
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
    """With a tiny model and a few rows in the place of the Hub's; all else is the document's."""
    monkeypatch.chdir(ROOT)
    # A run's own configuration is what it was made with.
    words = shlex.split(re.sub(r"runs/(\w+)/version_0/config", r"configs/\1", command))[2:]
    data = data_of(words)
    rows = rows_in_columns(tmp_path / "rows.jsonl", data.get("format", {}).get("columns", {}))
    main(
        [
            "check",
            *words,
            f"--model.policy={tied_model}",
            "--data.prepare=null",
            f"--data.train={rows}",
            f"--data.eval={{{', '.join(f'{name}: {rows}' for name in data['eval'])}}}",
            "--data.max_prompt_tokens=32",
            "--rollout.max_new_tokens=8",
            f"--trainer.default_root_dir={tmp_path / 'run'}",
        ]
    )


def test_the_python_road_trains(tied_model: str, tmp_path: Path) -> None:
    """README's program, with a tiny model, two epochs and no engine."""
    program = python_block("trainer.fit(")
    changes = {
        '"Qwen/Qwen2.5-0.5B-Instruct"': repr(tied_model),
        "max_epochs=100": "max_epochs=2, accelerator='cpu', enable_progress_bar=False",
        "accumulate_grad_batches=64": "accumulate_grad_batches=2",
        'CSVLogger("runs", name="own")': "logger",
        "RolloutCallback([MathReward()])": "RolloutCallback([MathReward()], sampler, None, 8)",
        'train="train.jsonl")': "train=train, prompts_per_epoch=4, max_prompt_tokens=16)",
    }
    for old, new in changes.items():
        assert program.count(old) == 1, old
        program = program.replace(old, new)
    logger = CSVLogger(tmp_path, name="run")
    train = str(write_prompts(tmp_path / "train.jsonl"))
    exec(program, {"logger": logger, "train": train, "sampler": HFSampler()})
    assert len(metrics_of(tmp_path)["train/loss"]) == 2
    assert (tmp_path / "run" / "version_0" / "checkpoints" / "last.ckpt").is_file()


def test_rewards_and_divergence_of_ones_own_lie_beside_the_configuration(
    tied_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = python_block("def short_enough") + python_block("register_divergence(")
    (tmp_path / "my_rewards.py").write_text(own)
    monkeypatch.syspath_prepend(tmp_path)
    fit(
        *tiny_overrides(tied_model, tmp_path),
        "--rollout.rewards=[sample_rewards.even_digits, my_rewards.short_enough]",
        "--rollout.reward_weights=[1.0, 0.1]",
        "--model.objective.divergence=chi_square",
        "--trainer.max_epochs=2",
    )
    metrics = metrics_of(tmp_path)
    assert metrics["rollout/reward/short_enough"] == [1.0, 1.0]
    # After an update the policy has left the reference, and chi-square's term is not KL's: its own
    # cost, f - f'u = 1 - u^2, is 0 where both agree.
    assert abs(metrics["train/process_term_mean"][0]) < 1e-6
    assert metrics["train/process_term_mean"][1] != 0
