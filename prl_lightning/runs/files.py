"""The files of a run's folder: their names, and readers for the metrics among them."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

METRICS = "metrics.csv"
EVALUATIONS = "evaluations.jsonl"
COMPLETIONS = "completions"
CONFIG = "config.yaml"

Curve = tuple[list[int], list[float]]


def read_metrics(file: Path) -> dict[str, Curve]:
    """Read the ``metrics.csv`` of Lightning's CSVLogger.

    Args:
        file: a partial last line, as a killed process leaves it, is ignored.

    Returns:
        Steps and values of every metric, in the order of the rows.
    """
    curves: dict[str, Curve] = {}
    for step, row in metrics_rows(file):
        for name, value in row.items():
            if name != "epoch":
                steps, values = curves.setdefault(name, ([], []))
                steps.append(step)
                values.append(value)
    return curves


def metrics_rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read a ``metrics.csv`` row by row.

    Args:
        file: see ``read_metrics``.

    Yields:
        The step and the metrics of each complete row.
    """
    for row in csv.DictReader(_complete_lines(file)):
        step = int(row.pop("step"))
        yield step, {name: float(value) for name, value in row.items() if value}


def read_evaluations(file: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """Read an ``evaluations.jsonl``.

    Args:
        file: one evaluation per line; a partial last line is ignored.

    Returns:
        The evaluations in order, and the numbers of the lines that are not JSON.
    """
    evaluations, broken = [], []
    for number, line in enumerate(_complete_lines(file), start=1):
        try:
            if line.strip():
                evaluations.append(json.loads(line))
        except json.JSONDecodeError:
            broken.append(number)
    return evaluations, broken


def _complete_lines(file: Path) -> list[str]:
    """Return the lines that end in a newline; a last line without one is still being written."""
    return file.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]


def completion_files(folder: Path) -> list[Path]:
    """Return the completion files of a run, ordered by epoch.

    Args:
        folder: of the run.
    """
    files = (folder / COMPLETIONS).glob("epoch=*.parquet")
    return sorted(files, key=lambda file: (len(file.name), file.name))


def refuse_existing(folder: Path, field: str) -> None:
    """Raise if the folder exists; nothing is overwritten.

    Args:
        folder: to be created.
        field: that names it, for the message.

    Raises:
        FileExistsError: it exists.
    """
    if folder.exists():
        raise FileExistsError(f"{field}={folder} exists: name another folder, or remove it.")
