"""A run folder is read as it is, whatever is missing from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prl_lightning.report import completions
from prl_lightning.report.completions import read_epoch
from prl_lightning.report.data import MAX_EPOCHS, find_run, read_run
from prl_lightning.runs.tables import write_table
from report.made_run import write_completions

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
    write_completions(file, rows)
    return file


def test_metrics_become_curves_and_evaluations_without_intervals(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text(METRICS)
    run = read_run(tmp_path)
    assert run["curves"]["rollout/reward"] == [[0, 1], [0.1235, 0.2]]
    assert run["curves"]["train/loss"] == [[0, 1], [None, -0.5]]
    assert (run["updates"], run["iterations"]) == (2, 2)
    assert run["sets"]["same"]["main"] == ["mean@16", "pass@16"]
    assert run["sets"]["same"]["points"][1] == {
        "step": 1,
        "metrics": {
            "mean@16": [0.375, None, None],
            "pass@4": [0.625, None, None],
            "pass@16": [0.875, None, None],
        },
    }


def test_half_a_row_of_metrics_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text(METRICS + "2,0.29,2,-0.7,,,\n3,0.3")
    assert read_run(tmp_path)["curves"]["rollout/reward"] == [[0, 1, 2], [0.1235, 0.2, 0.29]]


def test_evaluations_with_intervals_come_first(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text(METRICS)
    second = FIRST | {"step": 5}
    text = json.dumps(second) + "\n" + json.dumps(FIRST) + "\n" + json.dumps(FIRST)[:-7]
    (tmp_path / "evaluations.jsonl").write_text(text)
    run = read_run(tmp_path)
    first, last = run["sets"]["same"]["points"]
    assert (first["step"], last["step"], run["updates"]) == (0, 5, 5)
    assert first["metrics"]["mean@16"] == [0.25, 0.1235, 0.5]
    assert first["pass_curve"] == {
        "k": [1, 2],
        "pass": [0.25, 0.5],
        "low": [0.1, 0.2],
        "high": [0.4, 0.7],
    }
    assert not any("line" in note for note in run["notes"])


def test_a_broken_line_that_is_not_the_last_is_named(tmp_path: Path) -> None:
    (tmp_path / "evaluations.jsonl").write_text('{"step": 0, "se\n' + json.dumps(FIRST) + "\n")
    run = read_run(tmp_path)
    assert len(run["sets"]["same"]["points"]) == 1
    assert "evaluations.jsonl: line 1 cannot be read and is left out." in run["notes"]


def test_other_stages_are_sets_of_their_own(tmp_path: Path) -> None:
    lines = [FIRST, FIRST | {"stage": "test", "step": 7}]
    (tmp_path / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert list(read_run(tmp_path)["sets"]) == ["same", "test/same"]


def test_completions_in_groups_with_most_signal_first(tmp_path: Path) -> None:
    rows = [row(3, 0, 1.0), row(3, 0, 1.0), row(3, 1, 1.0), row(3, 1, 0.0, finished=False)]
    epoch = read_epoch(stored(tmp_path, rows, 3))
    assert (epoch["epoch"], epoch["step"], epoch["groups_stored"]) == (3, 6, 2)
    assert epoch["rewards"] == [1.0, 1.0, 1.0, 0.0]
    assert epoch["finished"] == [True, True, True, False]
    assert [group["prompt"] for group in epoch["groups"]] == ["prompt 1", "prompt 0"]
    assert [group["std"] for group in epoch["groups"]] == [0.5, 0.0]
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
    odd = row(
        ref_logprobs=None,
        process_rewards=None,
        completion="é",
        tokens=["\ufffd"] * 2,
        reward=float("nan"),
    )
    stored(tmp_path, [odd])
    epoch = read_run(tmp_path)["epochs"][0]
    completion = epoch["groups"][0]["completions"][0]
    assert completion["reference"] is completion["log_ratio"] is completion["process_part"] is None
    assert completion["text"] == "é"
    assert epoch["rewards"] == [None]


def test_an_end_token_is_not_a_difference(tmp_path: Path) -> None:
    file = stored(tmp_path, [row(tokens=["1", "\n", "2<|im_end|>"])])
    assert "text" not in read_epoch(file)["groups"][0]["completions"][0]


def test_steps_of_one_token_are_not_marked(tmp_path: Path) -> None:
    file = stored(tmp_path, [row(step_ends=[True, True, True]), row(step_ends=None)])
    assert [c["step_ends"] for c in read_epoch(file)["groups"][0]["completions"]] == [[], []]


def test_groups_beyond_the_limit_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(completions, "MAX_TOKENS", 14)
    rows = [row(group=number // 2, reward=float(number in (5, 8))) for number in range(10)]
    epoch = read_epoch(stored(tmp_path, rows))
    assert (epoch["groups_stored"], len(epoch["rewards"])) == (5, 10)
    # Those with a signal, which are not the first of the file.
    assert [group["prompt"] for group in epoch["groups"]] == ["prompt 2", "prompt 4"]


def test_completions_without_tokens_are_in_the_plots_alone(tmp_path: Path) -> None:
    per_token = ("policy_logprobs", "ref_logprobs", "process_rewards", "advantages", "step_ends")
    nothing = dict.fromkeys(("prompt", "completion", "tokens", *per_token))
    rows = [row(group=0), row(group=1, reward=0.5, length=7, finished=False, **nothing)]
    epoch = read_epoch(stored(tmp_path, rows))
    assert (epoch["groups_sampled"], epoch["groups_stored"], len(epoch["groups"])) == (2, 1, 1)
    assert (epoch["rewards"], epoch["lengths"], epoch["finished"]) == (
        [1.0, 0.5],
        [3, 7],
        [True, False],
    )


def test_an_outcome_that_is_one_a_token_is_taken_from_each(tmp_path: Path) -> None:
    """What is left is the process term's, which is nothing with the KL inside the reward."""
    per_token = row(outcome_advantages=[0.5, 0.51, 0.5])
    completion = read_epoch(stored(tmp_path, [per_token]))["groups"][0]["completions"][0]
    assert completion["advantage_part"] == [0.0, 0.0, 0.0]


def test_a_file_of_the_first_version_is_read(tmp_path: Path) -> None:
    """Without a set, and with the tokens of every completion."""
    old = row()
    del old["set"], old["outcome_advantages"]
    file = tmp_path / "completions" / "epoch=00000.parquet"
    write_table(file, [old])
    epoch = read_epoch(file)
    assert epoch["groups"][0]["set"] == "train"
    assert epoch["groups"][0]["completions"][0]["advantage_part"] == pytest.approx([0, 0.01, 0])


def test_few_of_many_epochs_first_and_last_among_them(tmp_path: Path) -> None:
    for epoch in range(30):
        stored(tmp_path, [row(epoch)], epoch)
    run = read_run(tmp_path)
    shown = [epoch["epoch"] for epoch in run["epochs"]]
    assert (len(shown), shown[0], shown[-1]) == (MAX_EPOCHS, 0, 29)
    assert any("12 of the 30 stored epochs" in note for note in run["notes"])


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    stored(tmp_path, [row(1)], 1)
    (tmp_path / "completions" / "epoch=00002.parquet").write_bytes(b"PAR1")
    run = read_run(tmp_path)
    assert [epoch["epoch"] for epoch in run["epochs"]] == [1]
    assert "completions/epoch=00002.parquet cannot be read and is left out." in run["notes"]


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed_everything: 0\n")
    run = read_run(tmp_path)
    assert [note.partition(":")[0] for note in run["notes"]] == [
        "No metrics.csv",
        "No evaluations.jsonl",
        "No completions",
    ]
    assert run["config"] == "seed_everything: 0\n"
    assert run["curves"] == run["sets"] == {}
    assert run["epochs"] == []
    assert run["updates"] is run["iterations"] is None


def test_the_newest_version_of_a_run(tmp_path: Path) -> None:
    for version in (2, 10):
        (tmp_path / f"version_{version}").mkdir()
        (tmp_path / f"version_{version}" / "config.yaml").touch()
    (tmp_path / "version_11").mkdir()  # has nothing
    assert find_run(str(tmp_path)).name == "version_10"
    assert read_run(tmp_path / "version_10")["name"] == f"{tmp_path.name}/version_10"


def test_the_newest_version_that_has_trained(tmp_path: Path) -> None:
    """A run's folder also has its later evaluations."""
    for version, columns in ((1, "step,train/loss"), (2, "step,train/loss"), (3, "step,val/x")):
        (tmp_path / f"version_{version}").mkdir()
        (tmp_path / f"version_{version}" / "metrics.csv").write_text(f"{columns}\n0,1\n")
    assert find_run(str(tmp_path)).name == "version_2"
    assert find_run(str(tmp_path / "version_3")).name == "version_3"


def test_what_was_evaluated_later_is_named(tmp_path: Path) -> None:
    for version, columns in ((1, "step,train/loss"), (2, "step,val/x")):
        (tmp_path / f"version_{version}").mkdir()
        (tmp_path / f"version_{version}" / "metrics.csv").write_text(f"{columns}\n0,1\n")
    stored(tmp_path / "version_3", [row()])
    assert find_run(str(tmp_path)).name == "version_1"
    said = "Evaluated or sampled later, each with a report of its own (prl report DIR): "
    assert f"{said}version_2, version_3." in read_run(tmp_path / "version_1")["notes"]
    assert not any(said in note for note in read_run(tmp_path / "version_3")["notes"])


def test_nothing_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"run_dir={tmp_path}: has none of metrics.csv"):
        find_run(str(tmp_path))
