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
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

from prl_lightning.trainer_access import save_now

# A scheduler signals every process, and launchers forward the signal to their children.
SAME_REQUEST_SECONDS = 2.0


class SaveOnSignal(Callback):
    """Save and exit at the end of an update on SIGTERM, and on SLURM's signal before a requeue.

    Lightning's own handlers save or communicate in the middle of a step. These handlers only record
    the signal, and all ranks check for it together. A second SIGTERM kills the process at once.
    """

    def __init__(self) -> None:
        self._signal: int | None = None
        self._sigterm_at: float | None = None

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

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Check for a signal after each update."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._stop_if_asked(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check again after the evaluation, before the next epoch is sampled."""
        self._stop_if_asked(trainer)

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

    def _stop_if_asked(self, trainer: Trainer) -> None:
        if not trainer.strategy.reduce_boolean_decision(self._signal is not None, all=False):
            return
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
        raise SIGTERMException


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
