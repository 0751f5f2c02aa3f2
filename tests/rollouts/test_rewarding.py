"""Failing reward functions: counted, written to a file, and a stop if too many fail."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger

from letter_votes import LetterVotes
from prl_lightning.rewards import RewardLimits, RewardSum
from prl_lightning.rollouts.rewarding import Rewarder
from prl_lightning.types import Completion, Prompt, Rollout
from tiny_runs import fit, metrics_of, tiny_overrides
from trainer_runs import TRAIN_ALONE

pytestmark = pytest.mark.process

REWARDS = "--rollout.rewards=[sample_rewards.even_digits, sample_rewards.raises_on_odd]"


def failures(run: Path) -> list[dict[str, str]]:
    lines = (run / "version_0" / "reward_failures.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_failures_are_counted_and_their_prompts_kept(
    tied_model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    limits = "--rollout.limits={max_failures: 1.0, failure_value: 0.125}"
    with pytest.warns(UserWarning, match=r"limits\.failure_value=0\.125"):
        fit(*tiny_overrides(tied_model, tmp_path), *TRAIN_ALONE, REWARDS, limits)
    metrics = metrics_of(tmp_path)
    odd = [16 * (1 - even) for even in metrics["rollout/reward/even_digits"]]
    assert metrics["rollout/reward_failures/raises_on_odd"] == pytest.approx(odd)
    assert sum(odd) > 0
    # Without a failure the reward is 2.
    expected = [(2 * (16 - n) + 0.125 * n) / 16 for n in odd]
    assert metrics["rollout/reward/raises_on_odd"] == pytest.approx(expected)
    rows = failures(tmp_path / "run")
    assert {(row["function"], row["kind"]) for row in rows} == {("raises_on_odd", "ValueError")}
    assert all(sum(map(str.isdigit, row["completion"])) % 2 and row["prompt"] for row in rows)
    # One traceback for all failures of a kind.
    assert capfd.readouterr().err.count("Traceback (most recent call last)") == 1


def test_too_many_failures_stop_the_run(tied_model: str, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"limits\.max_failures=0"):
        fit(*tiny_overrides(tied_model, tmp_path), REWARDS, "--rollout.limits.max_failures=0")
    assert failures(tmp_path / "run")


def test_unrewarded_completions_vote_alone_and_failed_comparisons_are_written(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trainer = Trainer(logger=CSVLogger(tmp_path, "run"), accelerator="cpu", barebones=False)
    texts = ["a", "bad", "a", "", "tie", "", "b", "b"]
    # Every second prompt is of another source, with another column.
    prompts = [Prompt([1], "?", {"level": 1} if row % 2 else {}) for row in range(len(texts))]
    rollouts = [
        Rollout(prompt, Completion([2], [0.0], finished=True), text)
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    rewards = RewardSum([LetterVotes()], limits=RewardLimits(workers=1, seconds=60.0))
    rewarder = Rewarder(rewards, trainer)
    with (
        pytest.warns(UserWarning, match="1 of 8 completions"),
        pytest.warns(UserWarning, match="1 of 2 groups"),
    ):
        rewarder.reward(rollouts, group_size=4)
    rewards.stop()
    a = ord("a")
    assert [rollout.answer for rollout in rollouts] == [a, a + 1, a, -1, 0, -1, 1, 2]
    rows = [(row["function"], row["kind"], row["completion"]) for row in failures(tmp_path / "run")]
    assert rows == [
        ("LetterVotes", "KeyError", "bad"),
        ("LetterVotes.answers", "LookupError", "tie"),
    ]
    assert capfd.readouterr().err.count("Traceback (most recent call last)") == 2
