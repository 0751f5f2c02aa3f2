"""What a run's last lines say: results before and after, an example, and where its files are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prl_lightning.runs.files import (
    CONFIG,
    EVALUATIONS,
    METRICS,
    completion_files,
    read_evaluations,
)
from prl_lightning.runs.tables import read_table
from prl_lightning.runs.text import updates

SHOWN_CHARACTERS = 400  # of a prompt or completion


def summary(folder: Path, heading: str, step: int, checkpoint: str) -> str:
    """Summarize a run.

    Args:
        folder: of the run. Without ``evaluations.jsonl`` there are no results in the text; a run
            from Python has no ``config.yaml``.
        heading: why the run has ended.
        step: number of updates.
        checkpoint: path of the last one, or empty.

    Returns:
        Lines for people.
    """
    lines = ["", f"{heading}: {updates(step)}."]
    if (folder / EVALUATIONS).is_file():
        evaluations, _ = read_evaluations(folder / EVALUATIONS)
        lines += _results(evaluations, step)
        lines += _example(folder, evaluations[-1]["solved_at"]) if evaluations else []
    has_config = (folder / CONFIG).is_file()
    lines += ["", f"metrics     {folder / METRICS}"]
    lines += [f"config      {folder / CONFIG}"] * has_config
    if checkpoint:
        lines += [
            f"checkpoint  {checkpoint}",
            "",
            "Next: see curves and completions in one HTML file with",
            f"  prl report {folder}",
        ]
    if checkpoint and has_config:
        lines += [
            "evaluate it again with",
            f"  prl validate --config {folder / CONFIG} --ckpt_path {checkpoint}",
            'or put your own data and model into the config (README, "Your own data").',
        ]
    return "\n".join(lines)


def _results(evaluations: list[dict[str, Any]], step: int) -> list[str]:
    """Return a line for each set and metric: in the first evaluation, and in the last one."""
    if not evaluations:
        return []
    first, last = evaluations[0]["sets"], evaluations[-1]["sets"]
    lines = ["Evaluation before and after training, with 95% intervals over problems:"]
    for name, results in last.items():
        for metric, after in results["metrics"].items():
            if "@" in metric:
                before = first.get(name, results)["metrics"].get(metric, after)
                label = metric if len(last) == 1 else f"{name} {metric}"
                lines.append(f"{label}: {_interval(before)} -> {_interval(after)}")
    evaluated = evaluations[-1]["step"]
    if evaluated < step:
        lines.append(f"The last evaluation was after {updates(evaluated)}, not after {step}.")
    return lines


def _interval(estimate: list[float]) -> str:
    mean, low, high = (f"{value:.2f}" for value in estimate)
    return f"{mean} [{low}, {high}]"


def _example(folder: Path, solved_at: float) -> list[str]:
    """Return the newest stored problem with a right and a wrong completion, if there is one."""
    for file in reversed(completion_files(folder)):
        try:
            rows = read_table(file, ["epoch", "group", "prompt", "completion", "reward"])
        except (ValueError, OSError):  # of a file that was damaged since; the report names it
            continue
        pairs: dict[int, dict[str, dict[str, Any]]] = {}
        for row in rows:
            if row["completion"] is not None:
                verdict = "right" if row["reward"] >= solved_at else "wrong"
                pairs.setdefault(row["group"], {}).setdefault(verdict, row)
        pair = next((pair for pair in pairs.values() if len(pair) == 2), None)
        if pair is not None:
            lines = [f"{name}  {_shown(pair[name]['completion'])}" for name in ("right", "wrong")]
            where = f"A problem of iteration {rows[0]['epoch'] + 1}, and two of its completions:"
            return ["", where, f"       {_shown(pair['right']['prompt'])}", *lines]
    return []


def _shown(text: str) -> str:
    """Quote a text in one line, without characters that would act on a terminal."""
    if len(text) > SHOWN_CHARACTERS:
        half = SHOWN_CHARACTERS // 2
        text = f"{text[:half]} ... {text[-half:]}"
    return repr(text)
