"""Read the folder of a run for its page, with a note for each file that is missing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prl_lightning.report.completions import read_epoch
from prl_lightning.runs.files import (
    COMPLETIONS,
    CONFIG,
    EVALUATIONS,
    METRICS,
    Curve,
    completion_files,
    read_evaluations,
    read_metrics,
)

# A page with more of them opens slowly.
MAX_EPOCHS = 12
MAX_POINTS = 1000

NOTE_IF_MISSING = {
    METRICS: "there are no curves. prl fit writes this file.",
    EVALUATIONS: "evaluations have no intervals and no curve over k. prl fit and prl validate "
    "write this file.",
    COMPLETIONS: "no completion can be shown. prl fit writes them every "
    "completions.every_n_epochs epochs.",
    CONFIG: "the settings are unknown. prl fit writes this file.",
}


def find_run(run_dir: str) -> Path:
    """Return the folder that has the files of a run.

    Args:
        run_dir: that folder, or the one above it: then the newest ``version_*`` that has trained
            is used, or the newest of all if none has trained.

    Raises:
        FileNotFoundError: neither folder has anything to show.
    """
    folder = Path(run_dir)
    candidates = [path for path in (folder, *_versions(folder)) if _has_something(path)]
    if candidates:
        return next(filter(_has_trained, candidates), candidates[0])
    raise FileNotFoundError(
        f"run_dir={run_dir}: neither it nor a version_* folder in it has any of "
        f"{', '.join(NOTE_IF_MISSING)}. Name the folder of a run, such as runs/prl/version_0."
    )


def _versions(folder: Path) -> list[Path]:
    """Return the ``version_*`` folders, newest first."""
    versions = [path for path in folder.glob("version_*") if path.name[8:].isdecimal()]
    return sorted(versions, key=lambda path: int(path.name[8:]), reverse=True)


def _has_something(folder: Path) -> bool:
    return any((folder / name).exists() for name in NOTE_IF_MISSING)


def _evaluated_later(folder: Path) -> list[str]:
    """Return a note if prl validate, test or predict have written newer folders."""
    versions = _versions(folder.resolve().parent)
    newer = versions[: versions.index(folder.resolve())] if folder.resolve() in versions else []
    others = [path.name for path in newer if _has_something(path) and not _has_trained(path)]
    names = ", ".join(reversed(others))
    return [f"Later evaluations and predictions (prl report DIR): {names}."] if others else []


def _has_trained(folder: Path) -> bool:
    curves = folder / METRICS
    return curves.exists() and "train/" in curves.read_text().partition("\n")[0]


def read_run(folder: Path) -> dict[str, Any]:
    """Read everything that the page shows.

    Args:
        folder: of a run; any of its files may be missing.

    Returns:
        Data for JSON: numbers have four significant digits, NaN and infinity are None.
    """
    missing = [name for name in NOTE_IF_MISSING if not (folder / name).exists()]
    notes = [f"No {name}: {NOTE_IF_MISSING[name]}" for name in missing] + _evaluated_later(folder)
    curves = {} if METRICS in missing else read_metrics(folder / METRICS)
    evaluations = [] if EVALUATIONS in missing else _read_evaluations(folder / EVALUATIONS, notes)
    epochs = _read_epochs(folder, notes)
    updates, iterations = _progress(curves, evaluations)
    path = folder.resolve()
    config = None if CONFIG in missing else (path / CONFIG).read_text("utf-8", errors="replace")
    run = {
        "name": f"{path.parent.name}/{path.name}" if path.name[:8] == "version_" else path.name,
        "updates": updates,
        "iterations": iterations,
        "curves": {
            name: [evenly_spread(values, MAX_POINTS) for values in curve]
            for name, curve in curves.items()
        },
        "sets": _by_set(evaluations or _without_intervals(curves)),
        "epochs": epochs,
        "config": config,
        "notes": notes,
    }
    return tidy(run)


def tidy(value: Any) -> Any:
    """Round all numbers to four significant digits, and replace NaN and infinity by None.

    Args:
        value: made of dictionaries, sequences, strings and numbers.

    Example:
        >>> tidy({"loss": [0.123456, float("nan"), 2.0, True]})
        {'loss': [0.1235, None, 2, True]}
    """
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        short = float(f"{value:.4g}")
        return int(short) if short.is_integer() else short
    if isinstance(value, dict):
        return {name: tidy(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [tidy(item) for item in value]
    return value


def evenly_spread(items: Sequence[Any], count: int) -> list[Any]:
    """Return at most ``count`` items in order, always the first and the last.

    Args:
        items: any number of them.
        count: at least 2.

    Example:
        >>> evenly_spread(range(10), 4)
        [0, 3, 6, 9]
    """
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _read_evaluations(file: Path, notes: list[str]) -> list[dict[str, Any]]:
    evaluations, broken = read_evaluations(file)
    notes += [f"{EVALUATIONS}: line {number} cannot be read and is left out." for number in broken]
    return sorted(evaluations, key=lambda evaluation: evaluation["step"])


def _without_intervals(curves: dict[str, Curve]) -> list[dict[str, Any]]:
    """Return the evaluations that ``metrics.csv`` has: means alone."""
    found: dict[int, dict[str, Any]] = {}
    for name, (steps, values) in curves.items():
        stage, _, rest = name.partition("/")
        where, _, metric = rest.rpartition("/")
        if stage == "val" and where and "@" in metric:
            for step, value in zip(steps, values, strict=True):
                evaluation = found.setdefault(step, {"step": step, "stage": stage, "sets": {}})
                one = evaluation["sets"].setdefault(where, {"metrics": {}})
                one["metrics"][metric] = [value, None, None]
    return [found[step] for step in sorted(found)]


def _by_set(evaluations: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the evaluations of each set, the last one of each step, and its main metrics."""
    sets: dict[str, dict[int, dict[str, Any]]] = {}
    for evaluation in evaluations:
        for name, result in evaluation["sets"].items():
            stage = evaluation.get("stage", "val")
            label = name if stage.startswith("val") else f"{stage}/{name}"
            sets.setdefault(label, {})[evaluation["step"]] = {"step": evaluation["step"], **result}
    return {
        label: {"main": _main_metrics(points), "points": list(points.values())}
        for label, points in sets.items()
    }


def _main_metrics(points: dict[int, dict[str, Any]]) -> list[str]:
    """Return the names of the mean, the majority vote and the pass@k, each of the largest k."""
    names = {name for point in points.values() for name in point["metrics"] if "@" in name}
    largest: dict[str, str] = {}
    for name in sorted(names, key=lambda name: int(name.partition("@")[2])):
        largest[name.partition("@")[0]] = name
    return [largest[kind] for kind in ("mean", "maj", "pass") if kind in largest]


def _read_epochs(folder: Path, notes: list[str]) -> list[dict[str, Any]]:
    files = completion_files(folder)
    chosen = evenly_spread(files, MAX_EPOCHS)
    if len(chosen) < len(files):
        notes.append(
            f"Completions of {len(chosen)} of the {len(files)} stored epochs are shown, to keep "
            f"this page small. {COMPLETIONS}/ has all of them."
        )
    epochs = []
    for file in chosen:
        try:
            epochs.append(read_epoch(file))
        except (ValueError, KeyError, OSError):
            notes.append(f"{COMPLETIONS}/{file.name} cannot be read and is left out.")
    return epochs


def _progress(
    curves: dict[str, Curve], evaluations: list[dict[str, Any]]
) -> tuple[int | None, int | None]:
    """Return the number of updates and epochs. A row of training counts earlier updates only."""
    done = [1 + max(steps) for name, (steps, _) in curves.items() if name.startswith("train/")]
    done += [evaluation["step"] for evaluation in evaluations]
    rollouts, _ = curves.get("rollout/reward", ([], []))
    return max(done, default=None), len(rollouts) or None
