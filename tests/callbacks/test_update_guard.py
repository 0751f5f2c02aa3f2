"""What is no number never reaches the weights, on one rank and on two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ranks import read, recorded_run, run_all
from tiny_runs import fit, metrics_of, tiny_overrides


def poisoned(updates: list[int], value: str = ".nan", in_loss: bool = False) -> list[str]:
    return [
        "--trainer.callbacks+=poison.Poison",
        f"--trainer.callbacks.updates={updates}",
        f"--trainer.callbacks.value={value}",
        f"--trainer.callbacks.in_loss={str(in_loss).lower()}",
    ]


def weights(run: Path) -> dict[str, Tensor]:
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    state: dict[str, Tensor] = checkpoint["state_dict"]
    return state


@pytest.mark.parametrize("value", [".nan", ".inf"])
def test_a_bad_update_is_skipped_and_the_others_are_not(
    value: str, tied_model: str, tmp_path: Path
) -> None:
    """The middle one of three does nothing to Adam's moments either: two clean ones are left."""
    overrides = [*recorded_run(tied_model, tmp_path), "--trainer.max_epochs=2"]
    overrides += ["--model.optimizer={class_path: torch.optim.AdamW, init_args: {lr: 0.01}}"]
    with pytest.warns(UserWarning, match="Update 1 is skipped"):
        fit(*overrides, *poisoned([1], value))
    after = read(tmp_path)["after"]
    fit(*overrides, "--trainer.max_epochs=1")
    clean = read(tmp_path)["after"]
    assert all(torch.equal(after[name], clean[name]) for name in clean)
    assert metrics_of(tmp_path)["train/skipped_updates"] == [0, 1]


def test_a_bad_loss_names_its_prompts(tied_model: str, tmp_path: Path) -> None:
    fit(*tiny_overrides(tied_model, tmp_path), *poisoned([1], in_loss=True))
    lines = (tmp_path / "run" / "version_0" / "skipped_updates.jsonl").read_text().splitlines()
    (row,) = map(json.loads, lines)
    assert (row["step"], row["rank"]) == (1, 0)
    # Two micro-batches of four groups of four: half of the update is not suspected.
    assert 0 < len(row["completions"]) < 16
    assert all(set(one) == {"prompt", "reward"} for one in row["completions"])


def test_too_many_in_a_row_stop_the_run_with_the_weights_before_them(
    tied_model: str, tmp_path: Path
) -> None:
    overrides = [*tiny_overrides(tied_model, tmp_path), "--trainer.max_epochs=9"]
    with pytest.raises(RuntimeError, match=r"guard\.max_skipped=2"):
        fit(*overrides, *poisoned([1, 3, 4, 5, 6]), "--guard.max_skipped=2")
    skipped = metrics_of(tmp_path)["train/skipped_updates"]
    assert skipped[:4] == [0, 1, 0, 1]
    state = weights(tmp_path / "run" / "version_0")
    assert all(tensor.isfinite().all() for tensor in state.values())


@pytest.fixture(scope="module")
def two_ranks(tied_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs whose second rank has a bad gradient in every update, or one bad loss."""
    root = tmp_path_factory.mktemp("two_ranks")
    runs = {
        name: [
            *recorded_run(tied_model, root / name),
            *("--trainer.accelerator=cpu", "--trainer.devices=2", f"--trainer.strategy={strategy}"),
            *poison,
        ]
        for name, strategy, poison in (
            ("ddp", "ddp", poisoned([0, 1, 2])),
            ("fsdp2", "fsdp2", poisoned([0, 1, 2])),
            ("loss", "ddp", poisoned([1], in_loss=True)),
        )
    }
    run_all(root, 2, runs)
    return root


def skipped_rows(run: Path) -> list[dict[str, Any]]:
    rows = (run / "run" / "version_0" / "skipped_updates.jsonl").read_text()
    return [json.loads(row) for row in rows.splitlines()]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_ranks_skip_together(strategy: str, two_ranks: Path) -> None:
    """One rank's gradient is bad; no rank's weights change, and none waits for another."""
    record = read(two_ranks / strategy)
    assert all(torch.equal(record["before"][name], w) for name, w in record["after"].items())
    assert record["metrics"]["train/skipped_updates"] == 1
    assert [row["rank"] for row in skipped_rows(two_ranks / strategy)] == [0, 1] * 3


def test_the_prompts_of_a_rank_whose_losses_are_sound_are_no_suspects(two_ranks: Path) -> None:
    """Its gradient is bad all the same: it is the mean over the ranks."""
    suspects = {row["rank"]: row["completions"] for row in skipped_rows(two_ranks / "loss")}
    assert suspects[0] == []
    assert suspects[1]


SCALED = (
    "--trainer.plugins={class_path: lightning.pytorch.plugins.MixedPrecision, "
    "init_args: {precision: 16-mixed, device: cpu}}"
)


def test_a_gradient_scaler_does_not_hide_a_bad_loss(tied_model: str, tmp_path: Path) -> None:
    """It would skip such updates for ever, and say nothing."""
    overrides = [*tiny_overrides(tied_model, tmp_path), "--trainer.max_epochs=9", SCALED]
    overrides += ["--rollout.max_engine_gap=1"]
    with pytest.raises(RuntimeError, match=r"2 updates in a row.*max_skipped=1"):
        fit(*overrides, *poisoned([1, 3, 4], in_loss=True), "--guard.max_skipped=1")
    assert metrics_of(tmp_path)["train/skipped_updates"][:4] == [0, 1, 0, 1]
    lines = (tmp_path / "run" / "version_0" / "skipped_updates.jsonl").read_text().splitlines()
    assert all(0 < len(json.loads(line)["completions"]) < 16 for line in lines)


def test_a_clean_run_skips_nothing(tied_model: str, tmp_path: Path) -> None:
    fit(*tiny_overrides(tied_model, tmp_path))
    assert metrics_of(tmp_path)["train/skipped_updates"] == [0, 0]
    assert not (tmp_path / "run" / "version_0" / "skipped_updates.jsonl").exists()
