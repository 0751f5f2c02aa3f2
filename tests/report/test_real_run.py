"""The pages of real runs of `prl fit` and `prl predict`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from prl_lightning.cli import main
from prl_lightning.runs.tables import read_table
from tiny_runs import ARITHMETIC, metrics_of, tiny_overrides, write_prompts

pytestmark = pytest.mark.process


def data_of(run_dir: Path) -> dict[str, Any]:
    """Return the data in the page of a run."""
    main(["report", str(run_dir)])
    page = next(run_dir.rglob("report.html")).read_text()
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert data is not None
    read: dict[str, Any] = json.loads(data[1])
    return read


@pytest.fixture(scope="module")
def run(tied_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fit of three epochs, and a prediction of its checkpoint on two sets of prompts."""
    folder = tmp_path_factory.mktemp("real")
    overrides = tiny_overrides(tied_model, folder)
    main(["fit", "--config", str(ARITHMETIC), *overrides, "--trainer.max_epochs=3",
          "--completions.groups=2"])  # fmt: skip
    other = write_prompts(folder / "other.jsonl", count=3, seed=2)
    sets = f"--evaluation.sets={{tiny: {folder / 'heldout.jsonl'}, other: {other}}}"
    checkpoint = next((folder / "run").rglob("last.ckpt"))
    main(["predict", "--config", str(ARITHMETIC), *overrides, sets, f"--ckpt_path={checkpoint}"])
    return folder


def test_a_fit(run: Path) -> None:
    data = data_of(run / "run" / "version_0")
    assert (data["updates"], data["iterations"]) == (3, 3)
    points = data["sets"]["tiny"]["points"]
    assert [point["step"] for point in points] == [0, 1, 2, 3]
    assert points[-1]["metrics"]["mean@4"][1] is not None
    assert len(points[-1]["pass_curve"]["pass"]) == 4
    rewards = data["curves"]["rollout/reward"][1]
    assert rewards == pytest.approx(metrics_of(run)["rollout/reward"], abs=1e-4)
    for epoch, at in zip(data["epochs"], (0, 2), strict=True):
        assert (epoch["epoch"], epoch["step"]) == (at, at)
        # The plots show all completions and agree with the curves.
        assert sum(epoch["rewards"]) / 16 == pytest.approx(rewards[at], abs=1e-4)
        assert (epoch["groups_sampled"], epoch["groups_stored"], len(epoch["groups"])) == (4, 2, 2)
        completion = epoch["groups"][0]["completions"][0]
        assert len(completion["process"]) == len(completion["tokens"]) == completion["length"]
    (note,) = data["notes"]
    assert "version_1" in note


def test_a_prediction_names_its_checkpoint_and_sets(run: Path) -> None:
    version = run / "run" / "version_1"
    rows = read_table(version / "completions" / "epoch=00003.parquet")
    assert {(row["epoch"], row["step"]) for row in rows} == {(3, 3)}
    sets = [row["set"] for row in rows]
    assert sets == ["tiny"] * 5 * 4 + ["other"] * 3 * 4
    assert [row["group"] for row in rows] == [group for group in range(8) for _ in range(4)]
    (epoch,) = data_of(version)["epochs"]
    assert (epoch["epoch"], epoch["step"], epoch["groups_stored"]) == (3, 3, 8)
    assert sorted(group["set"] for group in epoch["groups"]) == ["other"] * 3 + ["tiny"] * 5
