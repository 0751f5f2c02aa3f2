"""RunSummary: print the results of a run, and carry the files of a resumed run over."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from prl_lightning.runs.files import (
    COMPLETIONS,
    EVALUATIONS,
    METRICS,
    completion_files,
    metrics_rows,
    read_evaluations,
)
from prl_lightning.runs.folders import EARLIER_METRICS, folder_of
from prl_lightning.runs.summary import summary
from prl_lightning.runs.tables import read_table
from prl_lightning.trainer_access import checkpoint_path, csv_logger, run_folder


class RunSummary(Callback):
    """Print the first and last evaluation at the end of a run, an example, and where its files are.

    The evaluations are those that an ``EvaluationLog`` has written.

    A resumed run writes to a new folder. Metrics, evaluations and completions up to the checkpoint
    are copied into it, so that it has the complete curves. In its own folder the metrics up to the
    checkpoint are kept, and an evaluation keeps all of them.
    """

    def __init__(self) -> None:
        self._metrics_file = ""
        self._earlier_file = ""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Record where the metrics are written, for a run that resumes this one."""
        folder = run_folder(trainer)
        self._metrics_file = str(folder / METRICS)
        if stage != "fit" and (folder / EARLIER_METRICS).is_file():
            _log_again(trainer, metrics_rows(folder / EARLIER_METRICS))

    def state_dict(self) -> dict[str, str]:
        """Return where the metrics of this run are."""
        return {"metrics": self._metrics_file}

    def load_state_dict(self, state_dict: dict[str, str]) -> None:
        """Remember where the metrics of the resumed run are."""
        self._earlier_file = state_dict["metrics"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copy what the resumed run wrote up to the checkpoint."""
        if csv_logger(trainer) is None or not trainer.ckpt_path or not trainer.is_global_zero:
            return
        own = run_folder(trainer) / METRICS
        next_to_it = folder_of(Path(trainer.ckpt_path)) / METRICS  # if the run was moved
        files = (next_to_it, Path(self._earlier_file or own), own)
        found = [some for file in files for some in (file.with_name(EARLIER_METRICS), file)]
        earlier = next((f for f in found if f.is_file() and f.resolve() != own.resolve()), None)
        if earlier is not None:
            _log_again(trainer, _kept_rows(trainer, earlier))
            _carry_over(earlier.parent, own.parent, trainer.global_step)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Print the summary last, on one rank."""
        if stage == "fit" and not trainer.interrupted:
            self._print(trainer, "Stopped early" if trainer.should_stop else "Done")

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Print the summary of a run that a signal has stopped."""
        if isinstance(exception, SIGTERMException) and trainer.state.fn == TrainerFn.FITTING:
            self._print(trainer, "Stopped by a signal")

    def _print(self, trainer: Trainer, heading: str) -> None:
        folder = run_folder(trainer)
        if trainer.is_global_zero and (folder / METRICS).is_file():
            text = summary(folder, heading, trainer.global_step, _checkpoint(trainer))
            print(text, flush=True)


def _checkpoint(trainer: Trainer) -> str:
    callback = trainer.checkpoint_callback
    if not isinstance(callback, ModelCheckpoint):
        return ""
    unscheduled = checkpoint_path(trainer)  # written at a signal
    known = callback.last_model_path or callback.best_model_path
    return known or (str(unscheduled) if unscheduled.exists() else "")


def _kept_rows(trainer: Trainer, file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rows before the checkpoint, without the means over a part of its epoch."""
    is_within = not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
    for step, row in metrics_rows(file):
        is_mean = "train/loss" in row or "rollout/reward" in row
        is_of_epoch = is_mean and row.get("epoch", -1) >= trainer.current_epoch
        if step < trainer.global_step and not (is_within and is_of_epoch):
            yield step, row


def _log_again(trainer: Trainer, rows: Iterable[tuple[int, dict[str, Any]]]) -> None:
    """Log the rows of an earlier run; then its renamed file is not needed any more."""
    logger = csv_logger(trainer)
    if logger is None or not trainer.is_global_zero:
        return
    for step, row in rows:
        logger.experiment.log_metrics(row, step)  # without a second prefix
    logger.save()
    (run_folder(trainer) / EARLIER_METRICS).unlink(missing_ok=True)


def _carry_over(earlier: Path, folder: Path, step: int) -> None:
    """Copy evaluations and completions up to a step; unreadable files are skipped."""
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
        if sampled_at < step:  # the epoch of this step starts again
            (folder / COMPLETIONS).mkdir(exist_ok=True)
            shutil.copyfile(file, folder / COMPLETIONS / file.name)
