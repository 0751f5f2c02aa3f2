"""What a run leaves that max_time or a signal ends: an evaluation, completions, a true summary."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Timer

from interruptions import Command, callback
from prl_lightning.cli import main
from prl_lightning.runs.files import read_evaluations
from prl_lightning.runs.tables import read_table
from tiny_runs import ARITHMETIC, metrics_of, summary_line

pytestmark = pytest.mark.process

REWARDS = "--rollout.rewards=[sample_rewards.even_digits]"


def fit(command: Command, *args: str) -> None:
    """Three epochs of two updates of two micro-batches; only the first policy is evaluated."""
    rare = ["--trainer.check_val_every_n_epoch=100", "--completions.every_n_epochs=100"]
    main(["fit", "--config", str(ARITHMETIC), *command.options, REWARDS, *rare, *args])


def evaluated_steps(command: Command) -> list[int]:
    evaluations, _ = read_evaluations(command.folder / "run" / "version_0" / "evaluations.jsonl")
    return [evaluation["step"] for evaluation in evaluations]


def completions(command: Command, epoch: int) -> Path:
    return command.folder / f"run/version_0/completions/epoch={epoch:05d}.parquet"


@pytest.fixture
def command(tied_model: str, tmp_path: Path) -> Command:
    return Command(tied_model, tmp_path)


def test_max_time_ends_after_the_iteration_with_an_evaluation_and_its_completions(
    command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The Timer's clock counts micro-batches: 5 are in the first update of the second epoch.
    monkeypatch.setattr(Timer, "time_elapsed", lambda self, stage="": self._trained)
    monkeypatch.setattr(Timer, "_trained", 0, raising=False)

    def count(self: Timer, *args: object) -> None:
        self._trained += 1
        self._check_time_remaining(args[0])

    monkeypatch.setattr(Timer, "on_train_batch_end", count)
    fit(command, "--trainer.max_time=00:00:00:05")
    assert command.last()["global_step"] == 4
    assert len(metrics_of(command.folder)["train/loss"]) == 2
    assert evaluated_steps(command) == [0, 4]
    rows = read_table(completions(command, 1))
    assert {(row["step"], row["epoch"]) for row in rows} == {(2, 1)}
    values = metrics_of(command.folder)["val/tiny/mean@4"]
    screen = capsys.readouterr().out
    assert "Stopped early: 4 updates." in screen
    assert re.search(summary_line("mean@4", values), screen)
    assert "last evaluation" not in screen


def test_a_signal_leaves_completions_and_says_that_nothing_was_evaluated(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    at = callback("SignalAt", hook="on_train_batch_start", call=5)
    with pytest.raises(SystemExit):
        fit(command, f"--trainer.callbacks=[{json.dumps(at)}]")
    screen = capsys.readouterr().out
    assert "Stopped by a signal: 3 updates." in screen
    assert "The last evaluation was after 0 updates, not after 3." in screen
    checkpoint = next((command.folder / "run").rglob("last.ckpt"))
    assert f"--ckpt_path {checkpoint}" in screen
    # At two updates an epoch the policy that sampled is known exactly.
    rows = [row for row in read_table(completions(command, 1)) if row["tokens"] is not None]
    assert {row["step"] for row in rows} == {2}
    loops = torch.load(checkpoint, weights_only=True)["loops"]["fit_loop"]
    (loader,) = loops["state_dict"]["combined_loader"]
    values = loader["shares"][0]["old_logprobs"]["values"]
    written = torch.tensor(rows[0]["policy_logprobs"])
    torch.testing.assert_close(values[: len(written)], written)


def test_a_summary_says_of_which_update_its_last_evaluation_is(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(command, "--trainer.max_epochs=1", "--data.updates_per_epoch=1")
    screen = capsys.readouterr().out
    assert "Done: 1 update." in screen
    assert "The last evaluation was after 0 updates, not after 1." in screen
