"""The files of a run's folder: their names, and how the metrics among them are read."""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

METRICS = "metrics.csv"
EVALUATIONS = "evaluations.jsonl"
COMPLETIONS = "completions"
CONFIG = "config.yaml"

Curve = tuple[list[int], list[float]]


def read_metrics(file: Path) -> dict[str, Curve]:
    """Read a ``metrics.csv`` of Lightning's CSVLogger, without the half row that a kill leaves.

    Args:
        file: rows of step and metrics, each row with some of them.

    Returns:
        Steps and values of every metric, in the order of the rows.
    """
    curves: dict[str, Curve] = defaultdict(lambda: ([], []))
    for step, row in metrics_rows(file):
        for name, value in row.items():
            if name != "epoch":
                steps, values = curves[name]
                steps.append(step)
                values.append(value)
    return dict(curves)


def metrics_rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read a ``metrics.csv`` row by row.

    Args:
        file: see ``read_metrics``.

    Yields:
        Step and metrics of each whole row.
    """
    for row in csv.DictReader(_whole_lines(file)):
        yield (
            int(row["step"]),
            {name: float(value) for name, value in row.items() if value and name != "step"},
        )


def read_evaluations(file: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """Read an ``evaluations.jsonl``, without the half line that a kill leaves.

    Args:
        file: a line an evaluation.

    Returns:
        The evaluations in the order of the lines, and the numbers of lines that cannot be read.
    """
    evaluations, broken = [], []
    for number, line in enumerate(_whole_lines(file), start=1):
        try:
            if line.strip():
                evaluations.append(json.loads(line))
        except json.JSONDecodeError:
            broken.append(number)
    return evaluations, broken


def _whole_lines(file: Path) -> list[str]:
    """What ends with an end of line; the rest is being written, or was cut by a kill."""
    return file.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]


def completion_files(folder: Path) -> list[Path]:
    """List the stored epochs of a run.

    Args:
        folder: of the run.

    Returns:
        Files in the order of their epochs.
    """
    files = (folder / COMPLETIONS).glob("epoch=*.parquet")
    return sorted(files, key=lambda file: (len(file.name), file.name))
