"""A signal: the run saves at the end of the update, leaves, and goes on where it stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from interruptions import Command, Settings, callback, differing
from prl_lightning.cli import main
from tiny_runs import QUICKSTART


def fit(command: Command, *args: str) -> None:
    main(["fit", "--config", str(QUICKSTART), *command.options, *args])


def interrupted(command: Command, hook: str, call: int, signum: int = signal.SIGTERM) -> None:
    """Fit in this process until the signal has stopped it."""
    at = f'{{"class_path": "interruptions.SignalAt", "init_args": {{"hook": "{hook}", '
    before = signal.getsignal(signum)
    with pytest.raises(SystemExit) as stopped:
        fit(command, f'--trainer.callbacks=[{at}"call": {call}, "signum": {int(signum)}}}}}]')
    assert stopped.value.code is None  # the process would end with 0
    assert signal.getsignal(signum) == before


@pytest.fixture(scope="module")
def alone(tied_model: str, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    command = Command(tied_model, tmp_path_factory.mktemp("alone"))
    fit(command, "--trainer.callbacks.init_args.every_n_epochs=1")
    return command.last()


@pytest.mark.parametrize(
    ("hook", "call", "step"),
    [
        ("on_train_batch_start", 5, 3),  # within an update of the second epoch
        ("on_train_epoch_start", 1, 3),  # before it is sampled
        ("on_validation_batch_start", 0, 4),  # after it: the evaluation is finished first
    ],
)
def test_sigterm_saves_after_the_update_and_the_run_goes_on(
    hook: str,
    call: int,
    step: int,
    alone: Settings,
    tied_model: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    command = Command(tied_model, tmp_path)
    interrupted(command, hook, call)
    assert command.last()["global_step"] == step
    assert f"last.ckpt after {step} updates" in caplog.text
    fit(command, "--ckpt_path=last", "--trainer.callbacks.init_args.every_n_epochs=1")
    assert differing(command.last(), alone) == []


def test_sigterm_for_the_first_of_two_ranks_stops_both(tied_model: str, tmp_path: Path) -> None:
    command = Command(tied_model, tmp_path, ranks=2)
    code, output = command.run(
        callbacks=(callback("SignalAt", hook="on_train_batch_start", call=5),)
    )
    assert code == 0, output
    assert "Continue with the same command and --ckpt_path last" in output
    assert "Traceback" not in output
    checkpoint = command.last()
    assert checkpoint["global_step"] == 3
    assert len(checkpoint["prl_lightning"]) == 2


@pytest.mark.parametrize(
    ("signum", "env", "job"),
    [
        (signal.SIGUSR1, {}, "requeue 42\n"),
        (signal.SIGUSR1, {"ARRAY_JOB_ID": "40", "ARRAY_TASK_ID": "2"}, "requeue 40_2\n"),
        (signal.SIGTERM, {}, ""),
    ],
    ids=["the signal before the end", "of an array", "asked to go for good"],
)  # fmt: skip
def test_slurm_is_asked_for_another_turn(
    signum: signal.Signals,
    env: dict[str, str],
    job: str,
    tied_model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = tmp_path / "calls"
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n')
    scontrol.chmod(0o755)
    slurm = {"NTASKS": "1", "JOB_ID": "42", "PROCID": "0", "LOCALID": "0", "NODELIST": "localhost",
             "JOB_NAME": "train", "NODEID": "0"}  # fmt: skip
    for name, value in (slurm | env).items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")
    command = Command(tied_model, tmp_path / "run")
    interrupted(command, "on_train_batch_start", 1, signum)
    assert command.last()["global_step"] == 1
    assert (calls.read_text() if calls.exists() else "") == job


@pytest.mark.parametrize("before", [[], ["signal.SIGUSR1"]], ids=["alone", "after SLURM's"])
def test_a_second_sigterm_ends_the_process_but_an_echo_does_not(before: list[str]) -> None:
    script = f"""
import os, signal, time
import prl_lightning.callbacks.save_on_signal as preemption
preemption.SAME_REQUEST_SECONDS = 0.5
callback = preemption.SaveOnSignal()
signal.signal(signal.SIGTERM, callback._note)
for signum in [{", ".join(before)}]:
    callback._record(signum, None)
for wait in (0.0, 0.0, 1.0):
    time.sleep(wait)
    os.kill(os.getpid(), signal.SIGTERM)
    print("alive", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == -signal.SIGTERM, done.stderr
    assert done.stdout == "alive\nalive\n"
