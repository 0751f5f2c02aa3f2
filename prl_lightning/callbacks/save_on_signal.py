"""SaveOnSignal: save a checkpoint before exiting on SIGTERM or SLURM's requeue signal."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from types import FrameType
from typing import Any

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

from prl_lightning.trainer_access import save_now

# A scheduler signals every process, and launchers forward the signal to their children.
SAME_REQUEST_SECONDS = 2.0


class SaveOnSignal(Callback):
    """Save and exit at the end of an update on SIGTERM, and on SLURM's signal before a requeue.

    Lightning's own handlers save or communicate in the middle of a step. These handlers only record
    the signal, and all ranks check for it together. A second SIGTERM kills the process at once.

    ``prl validate``, ``test`` and ``predict`` have nothing to save: they exit at once with 143, and
    their finished completions are kept for the next attempt.
    """

    def __init__(self) -> None:
        self._signal: int | None = None
        self._sigterm_at: float | None = None
        self._is_evaluation = False

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install the handlers; Lightning restores the previous ones at the end."""
        if threading.current_thread() is not threading.main_thread():
            return
        signal.signal(signal.SIGTERM, self._record)
        slurm = _slurm(trainer)
        if slurm is not None and slurm.requeue_signal is not None:
            signal.signal(slurm.requeue_signal, self._record)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install the handlers if there was no sanity check."""
        self.on_sanity_check_start(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install the handler that ends an evaluation."""
        if trainer.state.fn != TrainerFn.FITTING:
            self._is_evaluation = True
            self.on_sanity_check_start(trainer, pl_module)

    on_test_start = on_validation_start
    on_predict_start = on_validation_start

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Say what an evaluation keeps, and end the other ranks."""
        if self._is_evaluation and isinstance(exception, SIGTERMException):
            if trainer.strategy.launcher is not None:
                trainer.strategy.launcher.kill(signal.SIGTERM)
            rank_zero_info(
                f"Stopped by a signal: finished completions are in {trainer.default_root_dir}/"
                "samples. Continue with the same command."
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Check for a signal after each update.

        Within an epoch, save and stop. After its last update, let Lightning end the epoch without
        an evaluation, so that it writes the epoch's row of metrics.
        """
        if (batch_idx + 1) % trainer.accumulate_grad_batches or not self._is_asked(trainer):
            return
        if trainer.is_last_batch:
            trainer.limit_val_batches = 0
        else:
            self._save(trainer)
            _log_unfinished_epoch(trainer)
            raise SIGTERMException

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save before the next epoch is sampled; Lightning stops after the row of metrics."""
        if self._is_asked(trainer):
            self._save(trainer)
            trainer._signal_connector.received_sigterm = True

    def _record(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if signum == signal.SIGTERM:
            if self._sigterm_at is None:
                self._sigterm_at = now
            elif now - self._sigterm_at > SAME_REQUEST_SECONDS:
                signal.signal(signum, signal.SIG_DFL)
                os.kill(os.getpid(), signum)
        if self._signal is None:
            self._signal = signum
            if self._is_evaluation:
                raise SIGTERMException(128 + signum)

    def _is_asked(self, trainer: Trainer) -> bool:
        """Whether any rank has received a signal; a collective."""
        return trainer.strategy.reduce_boolean_decision(self._signal is not None, all=False)

    def _save(self, trainer: Trainer) -> None:
        saved = save_now(trainer)
        rank_zero_info(
            f"Stopped by a signal: {saved} after {trainer.global_step} updates. "
            "Continue with the same command and --ckpt_path last."
        )
        slurm = _slurm(trainer)
        if slurm is not None and slurm.auto_requeue:
            asked = self._signal == slurm.requeue_signal
            if trainer.strategy.reduce_boolean_decision(asked, all=False):
                _requeue(trainer)


def _log_unfinished_epoch(trainer: Trainer) -> None:
    """Write the metrics of the epoch so far; RunSummary leaves this row out if the run resumes."""
    connector = trainer._logger_connector
    connector.epoch_end_reached()
    connector.log_metrics(connector.metrics["log"])


def _slurm(trainer: Trainer) -> SLURMEnvironment | None:
    # A strategy for one device has no cluster environment.
    environment = trainer._accelerator_connector.cluster_environment
    return environment if isinstance(environment, SLURMEnvironment) else None


def _requeue(trainer: Trainer) -> None:
    if not trainer.is_global_zero:
        return
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    done = subprocess.run(["scontrol", "requeue", job], check=False)
    rank_zero_info(f"scontrol requeue {job}: exit code {done.returncode}")
