"""Whichever process is killed from outside: no reward is lost, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from prl_lightning.rewards import RewardSum, fork_server
from rewards.orders import PATIENT, TIGHT, is_alive, length, obey, wait_until


def test_a_server_that_was_killed_is_started_again(scored: Any) -> None:
    rewards = RewardSum([length], limits=TIGHT)
    for _ in range(2):
        assert rewards.score(["?"], ["four"], {}).total.tolist() == [4.0]
        assert rewards._workers is not None
        server, (idle,) = rewards._workers._server._process, rewards._workers._idle
        assert server is not None
        os.kill(server.pid, signal.SIGKILL)
        assert wait_until(lambda: not is_alive(idle.process))  # noqa: B023
    rewards.stop()


class KillsOnce:
    """Kills its own process the first time, and the one it was forked from."""

    def __init__(self, file: Path, whom: str) -> None:
        self.file = file
        self.whom = whom

    def __call__(self, completions: Sequence[str], **columns: Any) -> list[float]:
        if completions == ["kill"] and not self.file.exists():
            self.file.touch()
            os.kill(os.getpid() if self.whom == "worker" else os.getppid(), signal.SIGKILL)
            time.sleep(1000)
        return [1.0 for _ in completions]


@pytest.mark.parametrize("whom", ["worker", "server"])
def test_a_process_killed_from_outside_costs_no_reward(
    whom: str, scored: Any, tmp_path: Path
) -> None:
    kills = KillsOnce(tmp_path / "killed", whom)
    scores = scored(["a", "b", "kill", "c"] * 3, kills, PATIENT)
    assert scores.total.tolist() == [1.0] * 12
    assert scores.failures == {"KillsOnce": 0}


class NeedsNewProcess:
    """Dies in a process that has worked before, once the others have nothing to do."""

    served = 0

    def __call__(self, completions: Sequence[str], **columns: Any) -> list[float]:
        self.served += 1
        if completions == ["new"] and self.served > 1:
            time.sleep(1.0)
            os._exit(3)
        if completions[0].startswith("meet"):
            return obey(completions)
        return [1.0 for _ in completions]


def test_a_call_whose_process_has_died_gets_a_new_one(scored: Any, tmp_path: Path) -> None:
    """The other one was forked from the same process, and may be about to die of the same cause."""
    scores = scored([f"meet {tmp_path} 2"] * 2 + ["new"], NeedsNewProcess(), PATIENT)
    assert scores.total.tolist() == [2.0, 2.0, 1.0]


TRAINER = """
import sys
from prl_lightning.rewards import RewardLimits, RewardSum

PIDS = sys.argv[1]

def hang(completions):
    import os, subprocess, time
    child = subprocess.Popen(["sleep", "1000"])
    alone = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    # Its parent is gone at once.
    command = ["sh", "-c", "setsid sleep 1000 >/dev/null 2>&1 & echo $!"]
    orphan = int(subprocess.run(command, capture_output=True).stdout)
    pids = [os.getpid(), os.getppid(), child.pid, alone.pid, orphan]
    open(PIDS, "w").write(" ".join(map(str, pids)))
    time.sleep(1000)

RewardSum([hang], limits=RewardLimits(seconds=1000.0, workers=1)).score(["?"], ["a"], {})
"""


def test_nothing_outlives_a_killed_trainer(tmp_path: Path) -> None:
    script, pids = tmp_path / "trainer.py", tmp_path / "pids"
    script.write_text(TRAINER)
    trainer = subprocess.Popen([sys.executable, str(script), str(pids)])
    assert wait_until(lambda: pids.exists() and len(pids.read_text().split()) == 5, 120)
    processes = list(map(int, pids.read_text().split()))
    assert all(map(is_alive, processes))
    trainer.kill()
    trainer.wait()
    assert wait_until(lambda: not any(map(is_alive, processes)))


def test_a_server_that_does_not_answer_is_replaced(
    scored: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fork_server, "_ANSWER_SECONDS", 1.0)
    monkeypatch.setattr(fork_server, "_END_SECONDS", 0.5)
    rewards = RewardSum([length], limits=TIGHT)
    try:
        rewards.score(["?"], ["four"], {})
        assert rewards._workers is not None
        server = rewards._workers._server._process
        assert server is not None
        os.kill(server.pid, signal.SIGSTOP)
        rewards._workers._idle.pop().kill()
        assert rewards.score(["?"], ["four"], {}).total.tolist() == [4.0]
        assert not is_alive(server.pid)
    finally:
        rewards.stop()
