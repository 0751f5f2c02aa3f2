"""RunSummary: what a run reached, where it lies, and its curves as a picture."""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

Curve = tuple[list[int], list[float]]

# Panels of the picture: title and the metrics that belong in it.
PANELS = (
    ("reward of the sampled completions", r"rollout/reward$"),
    ("evaluation", r"val/.*@\d+$"),
    ("KL to the reference, a token", r"train/kl_ref$"),
    ("entropy, a token", r"train/entropy$"),
)


class RunSummary(Callback):
    """Print what was reached from what, and draw ``curves.png`` beside ``metrics.csv``."""

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the picture and, as the last thing on the screen, the summary; on one rank."""
        folder = _csv_folder(trainer)
        finished = stage == "fit" and not trainer.interrupted and trainer.is_global_zero
        if folder is None or not finished or not (folder / "metrics.csv").is_file():
            return
        curves = read_metrics(folder / "metrics.csv")
        draw_curves(curves, folder / "curves.png")
        print(self._text(trainer, folder, curves))

    def _text(self, trainer: Trainer, folder: Path, curves: dict[str, Curve]) -> str:
        evaluations = {name: values for name, (_, values) in curves.items() if "@" in name}
        sets = {name.split("/")[1] for name in evaluations}
        lines = ["", f"Done: {trainer.global_step} updates."]
        for name, values in sorted(evaluations.items(), key=lambda item: _order(item[0])):
            _, where, metric = name.split("/")
            label = metric if len(sets) == 1 else f"{where} {metric}"
            lines.append(f"{label}: {values[0]:.2f} -> {values[-1]:.2f}")
        checkpoint = _checkpoint(trainer)
        lines += [
            "",
            f"curves      {folder / 'curves.png'}",
            f"metrics     {folder / 'metrics.csv'}",
        ]
        lines += [f"config      {folder / 'config.yaml'}"]
        if checkpoint:
            lines += [
                f"checkpoint  {checkpoint}",
                "",
                "Next: evaluate it again with",
                f"  prl validate --config {folder / 'config.yaml'} --ckpt_path {checkpoint}",
                "or put your own data and model into the config (README, 'Your own').",
            ]
        return "\n".join(lines)


def _order(name: str) -> tuple[str, int]:
    """Sort "val/set/pass@16" behind "val/set/pass@4"."""
    metric, _, number = name.partition("@")
    return metric, int(number)


def _csv_folder(trainer: Trainer) -> Path | None:
    loggers = [logger for logger in trainer.loggers if isinstance(logger, CSVLogger)]
    return Path(loggers[0].log_dir) if loggers else None


def _checkpoint(trainer: Trainer) -> str:
    callback = trainer.checkpoint_callback
    if not isinstance(callback, ModelCheckpoint):
        return ""
    return callback.last_model_path or callback.best_model_path


def read_metrics(file: Path) -> dict[str, Curve]:
    """Read a ``metrics.csv`` of Lightning's CSVLogger.

    Args:
        file: rows of step and metrics, each row with some of them.

    Returns:
        Steps and values of every metric, in the order of the rows.
    """
    curves: dict[str, Curve] = defaultdict(lambda: ([], []))
    with file.open(newline="") as rows:
        for row in csv.DictReader(rows):
            for name, value in row.items():
                if value and name not in ("step", "epoch"):
                    steps, values = curves[name]
                    steps.append(int(row["step"]))
                    values.append(float(value))
    return dict(curves)


def draw_curves(curves: dict[str, Curve], file: Path) -> None:
    """Draw reward, evaluation, KL and entropy over the updates.

    Args:
        curves: as ``read_metrics`` gives them.
        file: the PNG to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.5), layout="constrained")
    for axes, (title, pattern) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        names = [name for name in curves if re.fullmatch(pattern, name)]
        if any("@" in name for name in names):
            names.sort(key=_order)
        for name in names:
            steps, values = curves[name]
            label = name.removeprefix("val/")
            axes.plot(steps, values, label=label, marker="o" if len(steps) < 30 else None, ms=3)
        axes.set(title=title, xlabel="optimizer step")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if any("@" in name for name in names):
            axes.set_ylim(0, 1.02)
            axes.legend(frameon=False)
    figure.savefig(file, dpi=130)
