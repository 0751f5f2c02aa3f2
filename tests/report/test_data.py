"""Read run folders, also incomplete ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prl_lightning.report import completions
from prl_lightning.report.completions import read_epoch
from prl_lightning.report.data import MAX_EPOCHS, find_run, read_run
from prl_lightning.runs.tables import write_table

METRICS = """epoch,rollout/reward,step,train/loss,val/same/mean@16,val/same/pass@4,val/same/pass@16
0,,0,,0.25,0.5,0.75
0,0.1234567,0,nan,,,
1,0.2,1,-0.5,,,
1,,1,,0.375,0.625,0.875
"""
FIRST = {
    "step": 0,
    "epoch": 0,
    "stage": "val",
    "sets": {
        "same": {
            "problems": 4,
            "samples": 16,
            "metrics": {
                "pass@16": [0.75, 0.5, 1.0],
                "pass@4": [0.5, 0.25, 0.75],
                "mean@16": [0.25, 0.123456, 0.5],
                "length": [80.0, 70.0, 90.0],
            },
            "pass_curve": {"k": [1, 2], "pass": [0.25, 0.5], "low": [0.1, 0.2], "high": [0.4, 0.7]},
        }
    },
}


def row(epoch: int = 0, group: int = 0, reward: float = 1.0, **changes: Any) -> dict[str, Any]:
    return {
        "set": "train",
        "epoch": epoch,
        "step": 2 * epoch,
        "group": group,
        "prompt": f"prompt {group}",
        "completion": "1\n2",
        "reward": reward,
        "outcome_advantage": 0.5,
        "length": 3,
        "finished": True,
        "tokens": ["1", "\n", "2"],
        "policy_logprobs": [-0.5, -1.0, -0.25],
        "ref_logprobs": [-1.0, -0.5, -0.25],
        "process_rewards": [1.01, 1.0, 1.0],
        "advantages": [0.5, 0.51, 0.5],
        "outcome_advantages": None,
        "step_ends": [False, True, True],
    } | changes


def stored(folder: Path, rows: list[dict[str, Any]], epoch: int = 0) -> Path:
    file = folder / "completions" / f"epoch={epoch:05d}.parquet"
    write_table(file, rows)
    return file


def first_completion(folder: Path, *rows: dict[str, Any]) -> dict[str, Any]:
    completion: dict[str, Any] = read_epoch(stored(folder, [*rows]))["groups"][0]["completions"][0]
    return completion


def test_metrics_become_curves_and_evaluations_without_intervals(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text(METRICS + "2,0.29,2,-0.7,,,\n3,0.3")  # a partial row
    run = read_run(tmp_path)
    assert run["curves"]["rollout/reward"] == [[0, 1, 2], [0.1235, 0.2, 0.29]]
    assert run["curves"]["train/loss"] == [[0, 1, 2], [None, -0.5, -0.7]]
    assert (run["updates"], run["iterations"]) == (3, 3)
    assert run["sets"]["same"]["main"] == ["mean@16", "pass@16"]
    assert run["sets"]["same"]["points"][1] == {
        "step": 1,
        "metrics": {
            "mean@16": [0.375, None, None],
            "pass@4": [0.625, None, None],
            "pass@16": [0.875, None, None],
        },
    }


def test_evaluations_with_intervals_come_first(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text(METRICS)
    lines = [FIRST | {"step": 5}, FIRST, FIRST | {"stage": "test", "step": 7}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "evaluations.jsonl").write_text('{"step": 0, "se\n' + text + text[:-7])
    run = read_run(tmp_path)
    assert list(run["sets"]) == ["same", "test/same"]
    first, last = run["sets"]["same"]["points"]
    assert (first["step"], last["step"], run["updates"]) == (0, 5, 7)
    assert first["metrics"]["mean@16"] == [0.25, 0.1235, 0.5]
    assert first["pass_curve"] == FIRST["sets"]["same"]["pass_curve"]  # type: ignore[index]
    broken = [note for note in run["notes"] if note.startswith("evaluations.jsonl")]
    assert [note.partition(" cannot")[0] for note in broken] == ["evaluations.jsonl: line 1"]


def test_completions_in_groups_with_most_signal_first(tmp_path: Path) -> None:
    rows = [row(3, 0, 1.0), row(3, 0, 1.0), row(3, 1, 1.0), row(3, 1, 0.0, finished=False)]
    epoch = read_epoch(stored(tmp_path, rows, 3))
    assert (epoch["epoch"], epoch["step"], epoch["groups_stored"]) == (3, 6, 2)
    assert epoch["rewards"] == [1.0, 1.0, 1.0, 0.0]
    assert epoch["finished"] == [True, True, True, False]
    groups = [(group["set"], group["prompt"], group["std"]) for group in epoch["groups"]]
    assert groups == [("train", "prompt 1", 0.5), ("train", "prompt 0", 0.0)]
    completion = epoch["groups"][1]["completions"][0]
    assert completion["tokens"] == ["1", "\n", "2"]
    assert completion["step_ends"] == [1, 2]
    assert completion["log_ratio"] == [0.5, -0.5, 0.0]
    assert completion["process_part"] == pytest.approx([0.01, 0.0, 0.0])
    assert completion["advantage_part"] == pytest.approx([0.0, 0.01, 0.0])
    assert "text" not in completion


def test_a_difference_survives_the_rounding(tmp_path: Path) -> None:
    stored(tmp_path, [row(process_rewards=[1.0000123, 1.0, 1.0])])
    completion = read_run(tmp_path)["epochs"][0]["groups"][0]["completions"][0]
    assert completion["process"] == [1, 1, 1]
    assert completion["process_part"] == [1.23e-5, 0, 0]


def test_without_a_reference_and_with_partial_characters(tmp_path: Path) -> None:
    missing = {"ref_logprobs": None, "process_rewards": None, "reward": float("nan")}
    stored(tmp_path, [row(**missing, completion="é", tokens=["\ufffd"] * 2)])
    epoch = read_run(tmp_path)["epochs"][0]
    completion = epoch["groups"][0]["completions"][0]
    assert completion["reference"] is completion["log_ratio"] is completion["process_part"] is None
    assert completion["text"] == "é"
    assert epoch["rewards"] == [None]


@pytest.mark.parametrize(
    ("changes", "name", "expected"),
    [
        ({"tokens": ["1", "\n", "2<|im_end|>"]}, "text", None),  # an end token is no difference
        ({"step_ends": [True] * 3}, "step_ends", []),  # steps of one token are not marked
        ({"step_ends": None}, "step_ends", []),
        # The rest is the process term's: nothing with the KL inside the reward.
        ({"outcome_advantages": [0.5, 0.51, 0.5]}, "advantage_part", [0.0, 0.0, 0.0]),
    ],
    ids=["end token", "steps of one token", "no steps", "an outcome per token"],
)
def test_a_completion(changes: dict[str, Any], name: str, expected: Any, tmp_path: Path) -> None:
    assert first_completion(tmp_path, row(**changes)).get(name) == expected


def test_a_file_of_the_first_version_is_read(tmp_path: Path) -> None:
    """It has no set and no outcome advantage per token."""
    old = row()
    del old["set"], old["outcome_advantages"]
    assert first_completion(tmp_path, old)["advantage_part"] == pytest.approx([0, 0.01, 0])


def test_groups_beyond_the_limit_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(completions, "MAX_TOKENS", 14)
    rows = [row(group=number // 2, reward=float(number in (5, 8))) for number in range(10)]
    epoch = read_epoch(stored(tmp_path, rows))
    assert (epoch["groups_stored"], len(epoch["rewards"])) == (5, 10)
    # The groups with a signal, which are not the first of the file.
    assert [group["prompt"] for group in epoch["groups"]] == ["prompt 2", "prompt 4"]


def test_completions_without_tokens_are_in_the_plots_alone(tmp_path: Path) -> None:
    per_token = ("policy_logprobs", "ref_logprobs", "process_rewards", "advantages", "step_ends")
    nothing = dict.fromkeys(("prompt", "completion", "tokens", *per_token))
    rows = [row(group=0), row(group=1, reward=0.5, length=7, finished=False, **nothing)]
    epoch = read_epoch(stored(tmp_path, rows))
    assert (epoch["groups_sampled"], epoch["groups_stored"], len(epoch["groups"])) == (2, 1, 1)
    plots = (epoch["rewards"], epoch["lengths"], epoch["finished"])
    assert plots == ([1.0, 0.5], [3, 7], [True, False])


def test_some_of_many_epochs_are_shown_and_broken_files_named(tmp_path: Path) -> None:
    for epoch in range(30):
        stored(tmp_path, [row(epoch)], epoch)
    run = read_run(tmp_path)
    shown = [epoch["epoch"] for epoch in run["epochs"]]
    assert (len(shown), shown[0], shown[-1]) == (MAX_EPOCHS, 0, 29)
    assert any("12 of the 30" in note for note in run["notes"])
    (tmp_path / "completions" / "epoch=00000.parquet").write_bytes(b"PAR1")
    run = read_run(tmp_path)
    assert [epoch["epoch"] for epoch in run["epochs"]] == shown[1:]
    assert any(note.startswith("completions/epoch=00000.parquet") for note in run["notes"])


def test_missing_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed_everything: 0\n")
    run = read_run(tmp_path)
    notes = [note.partition(":")[0] for note in run.pop("notes")]
    assert notes == ["No metrics.csv", "No evaluations.jsonl", "No completions"]
    assert run == {
        "name": tmp_path.name,
        "config": "seed_everything: 0\n",
        "curves": {},
        "sets": {},
        "epochs": [],
        "updates": None,
        "iterations": None,
    }


def test_the_newest_version_that_has_trained_is_found(tmp_path: Path) -> None:
    versions = {number: tmp_path / f"version_{number}" for number in (2, 10, 11, 12, 13)}
    for folder in versions.values():
        folder.mkdir()
    for number in (2, 10):  # only version_2 and version_10 have any file
        (versions[number] / "config.yaml").touch()
    assert find_run(str(tmp_path)) == versions[10]
    assert read_run(versions[10])["name"] == f"{tmp_path.name}/version_10"
    for number, column in ((2, "train/loss"), (10, "train/loss"), (11, "val/x")):
        (versions[number] / "metrics.csv").write_text(f"step,{column}\n0,1\n")
    stored(versions[12], [row()])
    assert find_run(str(tmp_path)) == versions[10]
    assert find_run(str(versions[11])) == versions[11]
    note = "(prl report DIR): version_11, version_12."
    assert any(note in line for line in read_run(versions[10])["notes"])
    assert not any("prl report DIR" in line for line in read_run(versions[12])["notes"])


def test_a_folder_without_any_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"run_dir={tmp_path}: .*metrics.csv"):
        find_run(str(tmp_path))
