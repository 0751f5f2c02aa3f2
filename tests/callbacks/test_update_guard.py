"""Updates with a NaN or infinite gradient are skipped; test_two_ranks has several ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ranks import read, recorded_run
from tiny_runs import fit, metrics_of, tiny_overrides
from trainer_runs import TRAIN_ALONE

pytestmark = pytest.mark.process

SCALER = (
    "--trainer.plugins={class_path: lightning.pytorch.plugins.MixedPrecision, "
    "init_args: {precision: 16-mixed, device: cpu}}"
)


def poisoned(updates: list[int], value: str = ".nan", in_loss: bool = False) -> list[str]:
    return [
        "--trainer.callbacks+=poison.Poison",
        f"--trainer.callbacks.updates={updates}",
        f"--trainer.callbacks.value={value}",
        f"--trainer.callbacks.in_loss={str(in_loss).lower()}",
    ]


def skipped_rows(folder: Path) -> list[dict[str, Any]]:
    file = folder / "run" / "version_0" / "skipped_updates.jsonl"
    return [json.loads(row) for row in file.read_text().splitlines()]


def test_a_bad_update_is_skipped_and_the_others_are_not(tied_model: str, tmp_path: Path) -> None:
    """Adam's moments do not change either: two updates, one skipped, are one clean update."""
    overrides = [*recorded_run(tied_model, tmp_path), "--trainer.max_epochs=2", *TRAIN_ALONE]
    overrides += ["--model.optimizer={class_path: torch.optim.AdamW, init_args: {lr: 0.01}}"]
    with pytest.warns(UserWarning, match="Update 1 "):
        fit(*overrides, *poisoned([1]))
    after = read(tmp_path)["after"]
    fit(*overrides, "--trainer.max_epochs=1")
    clean = read(tmp_path)["after"]
    assert all(torch.equal(after[name], clean[name]) for name in clean)
    skipped = [metrics_of(tmp_path, version)["train/skipped_updates"] for version in (0, 1)]
    assert skipped == [[0, 1], [0]]
    assert not (tmp_path / "run" / "version_1" / "skipped_updates.jsonl").exists()


@pytest.mark.parametrize(
    ("poison", "options"),
    [
        (poisoned([1, 3, 4], ".inf"), []),
        # A gradient scaler would skip a bad loss forever and report nothing.
        (poisoned([1, 3, 4], in_loss=True), [SCALER, "--rollout.max_engine_gap=1"]),
    ],
    ids=["gradient", "loss with a scaler"],
)
def test_too_many_in_a_row_stop_the_run_with_finite_weights(
    poison: list[str], options: list[str], tied_model: str, tmp_path: Path
) -> None:
    overrides = [*tiny_overrides(tied_model, tmp_path), "--trainer.max_epochs=9", *options]
    overrides += TRAIN_ALONE
    with pytest.raises(RuntimeError, match=r"^2 .*guard\.max_skipped=1"):
        fit(*overrides, *poison, "--guard.max_skipped=1")
    assert metrics_of(tmp_path)["train/skipped_updates"][:4] == [0, 1, 0, 1]
    file = tmp_path / "run" / "version_0" / "checkpoints" / "last.ckpt"
    state = torch.load(file, weights_only=True)["state_dict"]
    assert all(tensor.isfinite().all() for tensor in state.values())
    rows = skipped_rows(tmp_path)
    assert [(row["step"], row["rank"]) for row in rows][:2] == [(1, 0), (3, 0)]
    if options:  # a bad loss names its prompts: those of one of two micro-batches of 16
        for row in rows:
            assert 0 < len(row["completions"]) < 16
            assert all(set(one) == {"prompt", "reward"} for one in row["completions"])
