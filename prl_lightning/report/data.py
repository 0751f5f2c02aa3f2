"""The folder of a run as plain data: what the page shows, and a sentence for what is not there."""

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

# A page of more opens slowly.
MAX_EPOCHS = 12
MAX_POINTS = 1000

HOW_TO_GET = {
    METRICS: "there are no curves; prl fit writes it into the folder of every run.",
    EVALUATIONS: "evaluations have no intervals and no curve over k; every validation of prl fit "
    "and prl validate adds its line to it.",
    COMPLETIONS: "no completion can be shown; prl fit stores some groups there, by its setting "
    "completions.every_n_epochs.",
    CONFIG: "the settings are not known; prl fit writes it into the folder of every run.",
}


def find_run(run_dir: str) -> Path:
    """Find the folder that has the files of a run.

    Args:
        run_dir: that folder, or the one above it, whose newest ``version_*`` is taken: of those
            that have trained, if any has.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: neither has anything to show.
    """
    folder = Path(run_dir)
    candidates = [path for path in (folder, *_versions(folder)) if _has_something(path)]
    if candidates:
        return next(filter(_has_trained, candidates), candidates[0])
    raise FileNotFoundError(
        f"run_dir={run_dir}: has none of {', '.join(HOW_TO_GET)}, nor has a version_* folder in "
        "it. Name the folder of a run, such as runs/prl/version_0."
    )


def _versions(folder: Path) -> list[Path]:
    """The newest first."""
    versions = [path for path in folder.glob("version_*") if path.name[8:].isdecimal()]
    return sorted(versions, key=lambda path: int(path.name[8:]), reverse=True)


def _has_something(folder: Path) -> bool:
    return any((folder / name).exists() for name in HOW_TO_GET)


def _evaluated_later(folder: Path) -> list[str]:
    """A sentence where prl validate, test or predict have left folders after this one."""
    versions = _versions(folder.resolve().parent)
    newer = versions[: versions.index(folder.resolve())] if folder.resolve() in versions else []
    others = [path for path in newer if _has_something(path) and not _has_trained(path)]
    if not others:
        return []
    names = ", ".join(path.name for path in reversed(others))
    return [f"Evaluated or sampled later, each with a report of its own (prl report DIR): {names}."]


def _has_trained(folder: Path) -> bool:
    curves = folder / METRICS
    return curves.exists() and "train/" in curves.read_text().partition("\n")[0]


def read_run(folder: Path) -> dict[str, Any]:
    """Read all that the page shows.

    Args:
        folder: of a run; any of its files may be missing.

    Returns:
        What JSON can hold: numbers with four significant digits, null for what is not finite.
    """
    notes = [
        f"No {name}: {how}" for name, how in HOW_TO_GET.items() if not (folder / name).exists()
    ]
    notes += _evaluated_later(folder)
    curves = _read_curves(folder / METRICS)
    evaluations = _read_evaluations(folder / EVALUATIONS, notes)
    epochs = _read_epochs(folder, notes)
    updates, iterations = _progress(curves, evaluations)
    config = folder / CONFIG
    path = folder.resolve()
    run = {
        "name": f"{path.parent.name}/{path.name}" if path.name[:8] == "version_" else path.name,
        "updates": updates,
        "iterations": iterations,
        "curves": {name: _thin_out(curve) for name, curve in curves.items()},
        "sets": _by_set(evaluations or _without_intervals(curves)),
        "epochs": epochs,
        "config": config.read_text(encoding="utf-8", errors="replace") if config.exists() else None,
        "notes": notes,
    }
    return tidy(run)


def tidy(value: Any) -> Any:
    """Round every number to four significant digits.

    Args:
        value: of dictionaries, sequences, strings and numbers.

    Returns:
        The same, with None for a number that is not finite.

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
    """Keep some items, always the first and the last.

    Args:
        items: any number of them.
        count: to keep, at least 2.

    Returns:
        At most ``count``, in their order.

    Example:
        >>> evenly_spread(range(10), 4)
        [0, 3, 6, 9]
    """
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _read_curves(file: Path) -> dict[str, Curve]:
    if not file.exists():
        return {}
    return read_metrics(file)


def _thin_out(curve: Curve) -> list[list[Any]]:
    return [evenly_spread(numbers, MAX_POINTS) for numbers in curve]


def _read_evaluations(file: Path, notes: list[str]) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    evaluations, broken = read_evaluations(file)
    notes += [f"{EVALUATIONS}: line {number} cannot be read and is left out." for number in broken]
    return sorted(evaluations, key=lambda evaluation: evaluation["step"])


def _without_intervals(curves: dict[str, Curve]) -> list[dict[str, Any]]:
    """Evaluations as far as ``metrics.csv`` has them."""
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
    """For each set its evaluations, the last of each step, and the metrics to show first."""
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
    """Mean, vote and the pass@k of the largest k."""
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
            f"Completions of {len(chosen)} of the {len(files)} stored epochs are shown, evenly "
            f"spread, so that this page stays small; {COMPLETIONS}/ has the others."
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
    """Updates and epochs so far. A row of training has the number of updates before its own."""
    done = [1 + max(steps) for name, (steps, _) in curves.items() if name.startswith("train/")]
    done += [evaluation["step"] for evaluation in evaluations]
    rollouts, _ = curves.get("rollout/reward", ([], []))
    return max(done, default=None), len(rollouts) or None
