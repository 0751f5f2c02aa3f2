"""After a signal the run saves at the end of the update, exits, and can be continued."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from interruptions import Command, callback, differing
from prl_lightning.callbacks import save_on_signal
from prl_lightning.cli import main
from tiny_runs import ARITHMETIC, metrics_of
from trainer_runs import TRAIN_ALONE

pytestmark = pytest.mark.process

# test_resume has rewards that draw random numbers; their processes start slowly.
REWARDS = "--rollout.rewards=[sample_rewards.even_digits]"


def fit(command: Command, *args: str) -> None:
    main(["fit", "--config", str(ARITHMETIC), *command.options, REWARDS, *args])


def interrupted(
    command: Command, hook: str, call: int, *args: str, signum: int = signal.SIGTERM
) -> None:
    """Fit in this process until the signal stops it."""
    at = callback("SignalAt", hook=hook, call=call, signum=int(signum))
    before = signal.getsignal(signum)
    with pytest.raises(SystemExit) as stopped:
        fit(command, *args, f"--trainer.callbacks=[{json.dumps(at)}]")
    assert stopped.value.code is None  # the process would end with 0
    assert signal.getsignal(signum) == before


@pytest.fixture(scope="module")
def alone(tied_model: str, tmp_path_factory: pytest.TempPathFactory) -> Command:
    command = Command(tied_model, tmp_path_factory.mktemp("alone"))
    fit(command, "--trainer.callbacks.init_args.every_n_epochs=1")
    return command


@pytest.mark.parametrize(
    ("hook", "call", "step", "evaluations"),
    [
        ("on_train_batch_start", 5, 3, 1),  # within an update of the second epoch
        ("on_train_batch_start", 7, 4, 1),  # in its last update: it is not evaluated
        ("on_train_epoch_start", 1, 3, 1),  # before it is sampled
        ("on_validation_batch_start", 0, 4, 2),  # after it: the evaluation is finished first
    ],
)
def test_sigterm_saves_after_the_update_and_the_run_can_be_continued(
    hook: str,
    call: int,
    step: int,
    evaluations: int,
    alone: Command,
    tied_model: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    command = Command(tied_model, tmp_path)
    interrupted(command, hook, call)
    assert command.last()["global_step"] == step
    assert f"last.ckpt after {step} updates" in caplog.text
    rows, whole = metrics_of(command.folder), metrics_of(alone.folder)
    assert rows["rollout/reward"] == whole["rollout/reward"][:2]  # its iteration has a row
    for name in ("train/loss", "train/seconds"):
        assert len(rows[name]) == 2, name
    assert len(rows["val/tiny/mean@4"]) == evaluations
    fit(command, "--ckpt_path=last", "--trainer.callbacks.init_args.every_n_epochs=1")
    assert differing(command.last(), alone.last()) == []
    rows = metrics_of(command.folder, version=1)
    assert rows["rollout/reward"] == whole["rollout/reward"]  # one row an iteration
    assert len(rows["train/loss"]) == 3


@pytest.mark.parametrize("signum", [signal.SIGUSR1, signal.SIGTERM])
def test_slurms_signal_requeues_the_job_and_sigterm_does_not(
    signum: signal.Signals, tied_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, scontrol = tmp_path / "calls", tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n')
    scontrol.chmod(0o755)
    slurm = {"NTASKS": "1", "JOB_ID": "42", "PROCID": "0", "LOCALID": "0", "NODELIST": "localhost",
             "JOB_NAME": "train", "NODEID": "0"}  # fmt: skip
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")
    command = Command(tied_model, tmp_path / "run")
    interrupted(command, "on_train_batch_start", 1, *TRAIN_ALONE, signum=signum)
    assert command.last()["global_step"] == 1
    if signum == signal.SIGTERM:
        assert not calls.exists()
        return
    # A job of an array has another name.
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "40")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    save_on_signal._requeue(Mock(is_global_zero=True))
    save_on_signal._requeue(Mock(is_global_zero=False))
    assert calls.read_text() == "requeue 42\nrequeue 40_2\n"


@pytest.mark.parametrize("before", [[], [signal.SIGUSR1]], ids=["alone", "after SLURM's"])
def test_a_second_sigterm_kills_the_process_but_an_echo_does_not(
    before: list[signal.Signals], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    done: list[Any] = []
    monkeypatch.setattr(save_on_signal.time, "monotonic", lambda: now)
    monkeypatch.setattr(save_on_signal.signal, "signal", lambda *args: done.append(args))
    monkeypatch.setattr(save_on_signal.os, "kill", lambda *args: done.append(args))
    saver = save_on_signal.SaveOnSignal()
    for signum in [*before, signal.SIGTERM]:
        saver._record(signum, None)
    now = save_on_signal.SAME_REQUEST_SECONDS  # a launcher forwards the signal to its children
    saver._record(signal.SIGTERM, None)
    assert done == []
    now += 0.1
    saver._record(signal.SIGTERM, None)
    assert done == [(signal.SIGTERM, signal.SIG_DFL), (os.getpid(), signal.SIGTERM)]
