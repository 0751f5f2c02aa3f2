"""The last lines of a run, from the files in its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prl_lightning.runs.summary import summary
from prl_lightning.runs.tables import write_table


def evaluation(step: int, **sets: dict[str, list[float]]) -> dict[str, Any]:
    named = {name: {"metrics": metrics} for name, metrics in sets.items()}
    return {"step": step, "solved_at": 0.5, "sets": named}


def write(folder: Path, *evaluations: dict[str, Any]) -> None:
    lines = [json.dumps(one) + "\n" for one in evaluations]
    (folder / "evaluations.jsonl").write_text("".join(lines))


def row(group: int, completion: str | None, reward: float, epoch: int = 2) -> dict[str, Any]:
    prompt = None if completion is None else f"Problem {group}?"
    return {
        "epoch": epoch,
        "group": group,
        "prompt": prompt,
        "completion": completion,
        "reward": reward,
    }


def write_completions(folder: Path, epoch: int, *rows: dict[str, Any]) -> None:
    write_table(folder / "completions" / f"epoch={epoch:05d}.parquet", rows)


def test_results_before_and_after_have_intervals(tmp_path: Path) -> None:
    before = {"mean@8": [0.25, 0.125, 0.375], "length": [9.0, 8.0, 10.0]}
    middle = {"mean@8": [0.5, 0.4, 0.6], "length": [9.0, 8.0, 10.0]}
    after = {"mean@8": [0.75, 0.7, 0.8], "length": [5.0, 4.0, 6.0]}
    write(tmp_path, *(evaluation(n, s=m) for n, m in ((0, before), (4, middle), (8, after))))
    lines = summary(tmp_path, "Done", 8, "last.ckpt").splitlines()
    assert lines[1] == "Done: 8 updates."
    assert lines[3] == "mean@8: 0.25 [0.12, 0.38] -> 0.75 [0.70, 0.80]"
    assert not [line for line in lines if "length" in line or "last evaluation" in line]


def test_several_sets_are_named_also_new_ones(tmp_path: Path) -> None:
    old, new = {"mean@8": [0.0, 0.0, 0.0]}, {"mean@8": [1.0, 1.0, 1.0], "pass@8": [1.0, 1.0, 1.0]}
    write(tmp_path, evaluation(0, a=old), evaluation(1, a=new, b=new))
    text = summary(tmp_path, "Done", 2, "")
    assert "\na mean@8: 0.00 [0.00, 0.00] -> 1.00 [1.00, 1.00]\n" in text
    assert "\na pass@8: 1.00 [1.00, 1.00] -> 1.00 [1.00, 1.00]\n" in text
    assert "\nb mean@8: 1.00 [1.00, 1.00] -> 1.00 [1.00, 1.00]\n" in text
    assert "The last evaluation was after 1 update, not after 2." in text
    assert "checkpoint" not in text


def test_the_newest_problem_with_a_right_and_a_wrong_completion(tmp_path: Path) -> None:
    write(tmp_path, evaluation(0, s={}))
    old = [row(0, "old right", 1.0, 0), row(0, "old wrong", 0.0, 0)]
    write_completions(tmp_path, 0, *old)
    write_completions(
        tmp_path, 2,
        row(0, "all right", 1.0), row(0, "too", 0.5),
        row(1, "wrong", 0.4), row(1, "right", 0.5), row(1, "also right", 1.0),
        row(2, None, 1.0), row(2, None, 0.0),
    )  # fmt: skip
    lines = summary(tmp_path, "Done", 3, "").splitlines()
    start = lines.index("A problem of iteration 3, and two of its completions:")
    assert [line.split() for line in lines[start + 1 : start + 4]] == [
        ["'Problem", "1?'"],
        ["right", "'right'"],
        ["wrong", "'wrong'"],
    ]


def test_without_a_mixed_group_or_a_readable_file_there_is_no_example(tmp_path: Path) -> None:
    write(tmp_path, evaluation(0, s={}))
    write_completions(tmp_path, 1, row(0, "a", 1.0), row(1, "b", 0.0), row(2, None, 0.0))
    (tmp_path / "completions" / "epoch=00002.parquet").write_text("no table")
    assert "A problem" not in summary(tmp_path, "Done", 1, "")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("4\n\x1b[31m\x9b31m\u202e", r"'4\n\x1b[31m\x9b31m\u202e'"),
        ("a" * 300 + "b" * 300, f"'{'a' * 200} ... {'b' * 200}'"),
    ],
)
def test_a_models_text_has_no_effect_on_a_terminal(text: str, shown: str, tmp_path: Path) -> None:
    write(tmp_path, evaluation(0, s={}))
    write_completions(tmp_path, 0, row(0, text, 1.0), row(0, "x", 0.0))
    assert f"right  {shown}" in summary(tmp_path, "Done", 1, "").splitlines()


def test_a_run_without_evaluations_has_its_files(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    text = summary(tmp_path, "Done", 1, "")
    assert text.splitlines() == [
        "",
        "Done: 1 update.",
        "",
        f"metrics     {tmp_path}/metrics.csv",
        f"config      {tmp_path}/config.yaml",
    ]


def test_a_run_from_python_has_no_configuration_to_name(tmp_path: Path) -> None:
    text = summary(tmp_path, "Done", 1, "last.ckpt")
    assert "last.ckpt" in text
    assert "prl report" in text
    assert "config" not in text
