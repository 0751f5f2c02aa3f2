"""RunSummary: what a run reached, where it lies, and its curves as a picture."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from prl_lightning.runs.files import (
    COMPLETIONS,
    CONFIG,
    EVALUATIONS,
    METRICS,
    Curve,
    completion_files,
    metrics_rows,
    read_evaluations,
    read_metrics,
)
from prl_lightning.runs.tables import read_table
from prl_lightning.trainer_access import run_folder

# Panels of the picture: title and the metrics that belong in it.
PANELS = (
    ("reward of the sampled completions", r"rollout/reward$"),
    ("evaluation", r"val/.*@\d+$"),
    ("KL to the reference, a token", r"train/kl_ref$"),
    ("entropy, a token", r"train/entropy$"),
)


class RunSummary(Callback):
    """Print what was reached from what, and draw ``curves.png`` beside ``metrics.csv``.

    A continued run has a folder of its own. It begins with what the run before has left up to the
    checkpoint: curves, evaluations and completions.
    """

    def __init__(self) -> None:
        self._metrics_file = ""
        self._earlier_file = ""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Note where the metrics go, for a run that continues this one."""
        folder = run_folder(trainer)
        self._metrics_file = "" if folder is None else str(folder / METRICS)

    def state_dict(self) -> dict[str, str]:
        """Where the metrics so far are."""
        return {"metrics": self._metrics_file}

    def load_state_dict(self, state_dict: dict[str, str]) -> None:
        """Where the metrics so far were."""
        self._earlier_file = state_dict["metrics"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with what the continued run had up to the checkpoint."""
        folder = run_folder(trainer)
        if folder is None or not trainer.ckpt_path or not trainer.is_global_zero:
            return
        beside = Path(trainer.ckpt_path).parent.parent / METRICS  # wherever it was moved to
        earlier = beside if beside.is_file() else Path(self._earlier_file)
        if earlier.is_file():
            logger = next(logger for logger in trainer.loggers if isinstance(logger, CSVLogger))
            for step, row in metrics_rows(earlier):
                if step < trainer.global_step:
                    logger.log_metrics(row, step)
            _carry_over(earlier.parent, folder, trainer.global_step)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the picture and, as the last thing on the screen, the summary; on one rank."""
        folder = run_folder(trainer)
        finished = stage == "fit" and not trainer.interrupted and trainer.is_global_zero
        if folder is None or not finished or not (folder / METRICS).is_file():
            return
        curves = read_metrics(folder / METRICS)
        draw_curves(curves, folder / "curves.png")
        print(self._text(trainer, folder, curves))

    def _text(self, trainer: Trainer, folder: Path, curves: dict[str, Curve]) -> str:
        evaluations = {
            name: values
            for name, (_, values) in curves.items()
            if name.rpartition("@")[2].isdecimal()
        }
        sets = {name.partition("/")[2].rpartition("/")[0] for name in evaluations}
        lines = ["", f"Done: {trainer.global_step} updates."]
        for name, values in sorted(evaluations.items(), key=lambda item: _order(item[0])):
            where, _, metric = name.partition("/")[2].rpartition("/")
            label = metric if len(sets) == 1 else f"{where} {metric}"
            lines.append(f"{label}: {values[0]:.2f} -> {values[-1]:.2f}")
        checkpoint = _checkpoint(trainer)
        lines += [
            "",
            f"curves      {folder / 'curves.png'}",
            f"metrics     {folder / METRICS}",
        ]
        lines += [f"config      {folder / CONFIG}"]
        if checkpoint:
            lines += [
                f"checkpoint  {checkpoint}",
                "",
                "Next: evaluate it again with",
                f"  prl validate --config {folder / CONFIG} --ckpt_path {checkpoint}",
                "or put your own data and model into the config (README, 'Your own data').",
            ]
        return "\n".join(lines)


def _order(name: str) -> tuple[str, int]:
    """Sort "val/set/pass@16" behind "val/set/pass@4"."""
    metric, _, number = name.rpartition("@")
    return metric, int(number)


def _checkpoint(trainer: Trainer) -> str:
    callback = trainer.checkpoint_callback
    if not isinstance(callback, ModelCheckpoint):
        return ""
    return callback.last_model_path or callback.best_model_path


def _carry_over(earlier: Path, folder: Path, step: int) -> None:
    """Copy evaluations and completions up to a step; what cannot be read stays where it is."""
    if earlier.resolve() == folder.resolve():
        return
    folder.mkdir(parents=True, exist_ok=True)
    if (earlier / EVALUATIONS).is_file():
        evaluations, _ = read_evaluations(earlier / EVALUATIONS)
        kept = [evaluation for evaluation in evaluations if evaluation["step"] <= step]
        with (folder / EVALUATIONS).open("a") as lines:
            lines.writelines(json.dumps(evaluation) + "\n" for evaluation in kept)
    for file in completion_files(earlier):
        try:
            sampled_at = read_table(file, ["step"])[0]["step"]
        except (ValueError, OSError):
            continue
        if sampled_at < step:  # at it, the epoch begins anew
            (folder / COMPLETIONS).mkdir(exist_ok=True)
            shutil.copyfile(file, folder / COMPLETIONS / file.name)


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
