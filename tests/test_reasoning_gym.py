"""Tasks of reasoning-gym through the command line, from the documentation's configuration."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from prl_lightning.checks.contradictions import ConfigurationError
from prl_lightning.cli import main
from tiny_runs import ARITHMETIC, fit, metrics_of, tiny_overrides

pytestmark = pytest.mark.process

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
MOVES = "--data.train.init_args.curriculum={iterations: 1, raise_above: 0.3, lower_below: 0.1}"


@pytest.fixture
def arguments(tied_model: str, tmp_path: Path) -> list[str]:
    """Arithmetic at a tiny size, with the sources and rewards of the documentation."""
    section = PAGE.read_text().partition("## Tasks of reasoning-gym")[2]
    [config] = re.findall(r"```yaml\n(.*?)```", section.partition("\n## ")[0], flags=re.DOTALL)
    (tmp_path / "gym.yaml").write_text(config)
    ours = ("--data.train=", "--evaluation.sets=", "--rollout.rewards=", "--data.max_prompt_tokens")
    tiny = [word for word in tiny_overrides(tied_model, tmp_path) if not word.startswith(ours)]
    return ["--config", str(tmp_path / "gym.yaml"), *tiny, "--data.max_prompt_tokens=500"]


def check(*words: str) -> None:
    main(["check", "--config", str(ARITHMETIC), *words])


def test_the_documented_configuration_is_checked(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    check(*arguments)
    assert "evaluation products: 4 samples" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--data.train.init_args.tasks={product: {}}", r"'product'\. The nearest are products"),
        ("--data.train.init_args.tasks={gcd: {config: {max_number: 1}}}", r"'max_number'.*nearest"),
        ("--data.train.init_args.tasks={n_queens: {}}", r"\['n_queens'\].*evaluates_answers=true"),
        ("--data.train.init_args.sizes=3", r"sizes"),
    ],
)
def test_what_cannot_work_is_found_before_anything_is_loaded(
    word: str, message: str, arguments: list[str]
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        check(*arguments, word)
    with pytest.raises(ConfigurationError, match=message):
        fit(*arguments, word)


def test_a_continued_run_has_the_levels_and_rows_of_one_left_alone(
    arguments: list[str], tmp_path: Path
) -> None:
    rewards = "[sample_rewards.even_digits, prl_lightning.rewards.ReasoningGymReward]"
    command = [*arguments, MOVES, f"--rollout.rewards={rewards}", "--evaluation.samples=2"]
    every = "--trainer.callbacks.init_args.every_n_epochs=1"
    fit(*command, every, "--trainer.max_epochs=2")
    fit(*command, every, "--trainer.max_epochs=4", "--ckpt_path=last")
    fit(*command, "--trainer.max_epochs=4")
    resumed, whole = metrics_of(tmp_path, version=1), metrics_of(tmp_path, version=2)
    levels = whole["rollout/level/products"]
    assert levels[0] == 0 < levels[-1]
    for name in ("level/products", "task_reward/products", "reward", "tokens"):
        assert resumed[f"rollout/{name}"] == whole[f"rollout/{name}"]
    ends = [
        torch.load(tmp_path / "run" / f"version_{version}" / "checkpoints" / "last.ckpt")
        for version in (1, 2)
    ]
    assert ends[0]["PromptDataModule"] == ends[1]["PromptDataModule"]
    assert all(torch.equal(w, ends[1]["state_dict"][n]) for n, w in ends[0]["state_dict"].items())
