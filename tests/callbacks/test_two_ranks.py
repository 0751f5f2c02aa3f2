"""What one rank meets stops or skips on both: bad gradients, failing rewards, a signal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from interruptions import Command
from ranks import read, recorded_run, start_on_ranks
from stop_all import stop_all
from tiny_runs import ARITHMETIC, tiny_overrides
from trainer_runs import TRAIN_ALONE

pytestmark = pytest.mark.process

SIGNAL = "{class_path: interruptions.SignalAt, init_args: {hook: on_train_batch_start, call: 5}}"
POISON = ["--trainer.callbacks+=poison.Poison", "--trainer.callbacks.value=.nan"]
IN_GRADIENT = [*POISON, "--trainer.callbacks.updates=[0, 1, 2]"]
IN_LOSS = [*POISON, "--trainer.callbacks.updates=[1]", "--trainer.callbacks.in_loss=true"]


class Runs(NamedTuple):
    root: Path
    endings: list[dict[str, str]]  # of each rank: run -> how it ended
    output: str
    signalled: Command


@pytest.fixture(scope="module")
def runs(tied_model: str, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Five runs in the same two processes; something happens on one of the ranks alone."""
    root = tmp_path_factory.mktemp("two_ranks")
    devices = ["--trainer.accelerator=cpu", "--trainer.devices=2"]
    ddp, fsdp2 = ([*devices, f"--trainer.strategy={strategy}"] for strategy in ("ddp", "fsdp2"))
    (root / "rewards").mkdir()
    signalled = Command(tied_model, root / "signal", ranks=2)
    commands = {
        "ddp": [*recorded_run(tied_model, root / "ddp"), *ddp, *IN_GRADIENT],
        "fsdp2": [*recorded_run(tied_model, root / "fsdp2"), *fsdp2, *IN_GRADIENT],
        "loss": [*recorded_run(tied_model, root / "loss"), *ddp, *IN_LOSS],
        "signal": [
            *signalled.options,
            "--rollout.rewards=[sample_rewards.even_digits]",
            f"--trainer.callbacks=[{SIGNAL}]",
        ],
        "rewards": [
            *tiny_overrides(tied_model, root / "rewards"),
            *ddp,
            "--rollout.rewards=[sample_rewards.raises_on_last_rank]",
            "--rollout.limits.max_failures=0.4",
        ],
    }
    fit = ["fit", f"--config={ARITHMETIC}"]
    words = [[*fit, *args, *TRAIN_ALONE] for args in commands.values()]
    code, output = start_on_ranks(2, stop_all, words, str(root)).finish(timeout=900)
    assert code == 0, output
    ranks = [json.loads((root / f"endings.{rank}").read_text()) for rank in (0, 1)]
    endings = [dict(zip(commands, of_rank, strict=True)) for of_rank in ranks]
    return Runs(root, endings, output, signalled)


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(row) for row in (folder / "version_0" / name).read_text().splitlines()]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_ranks_skip_together(strategy: str, runs: Runs) -> None:
    """One rank's gradient is NaN; no rank's weights change, and no rank waits for another."""
    assert [endings[strategy] for endings in runs.endings] == ["completed"] * 2
    record = read(runs.root / strategy)
    assert all(torch.equal(record["before"][name], w) for name, w in record["after"].items())
    assert record["metrics"]["train/skipped_updates"] == 1
    skipped = rows(runs.root / strategy / "run", "skipped_updates.jsonl")
    assert [row["rank"] for row in skipped] == [0, 1] * 3


def test_only_the_rank_with_a_bad_loss_names_prompts(runs: Runs) -> None:
    """The other rank's gradient is NaN all the same, because it is the mean over the ranks."""
    skipped = rows(runs.root / "loss" / "run", "skipped_updates.jsonl")
    suspects = {row["rank"]: row["completions"] for row in skipped}
    assert suspects[0] == []
    assert suspects[1]


def test_a_signal_for_the_first_rank_stops_both(runs: Runs) -> None:
    assert [endings["signal"] for endings in runs.endings] == ["exit 0"] * 2
    assert "--ckpt_path last" in runs.output
    checkpoint = runs.signalled.last()
    assert checkpoint["global_step"] == 3
    assert len(checkpoint["prl_lightning"]) == 2


def test_too_many_failures_over_all_ranks_stop_both(runs: Runs) -> None:
    """8 of 16 completions fail, all of them on the last rank."""
    for endings in runs.endings:
        assert endings["rewards"].startswith("RuntimeError: ")
        assert "limits.max_failures=0.4" in endings["rewards"]
    failures = rows(runs.root / "rewards" / "run", "reward_failures.jsonl")
    assert {row["rank"] for row in failures} == {1}
