"""Starting the server, calling functions through it, and replacing it when it is killed."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from noisy import noisy_digits
from prl_lightning.rewards import RewardLimits, RewardScores, RewardSum
from prl_lightning.rewards.sandbox import client
from rewards.orders import PATIENT, TIGHT, Whole, is_alive, length, wait_until

pytestmark = pytest.mark.process


def test_values_are_those_of_a_call_without_limits(scored: Any) -> None:
    texts = ["a" * n for n in range(50)]
    here = RewardSum([length]).score(["?"] * 50, texts, {})
    assert scored(texts, length).total.tolist() == here.total.tolist()


def test_a_function_that_needs_the_batch_gets_it(scored: Any) -> None:
    assert scored(["a", "b", "c"], Whole()).total.tolist() == [3.0, 2.0, 1.0]


async def patient(completions: Sequence[str], **columns: Any) -> list[float]:
    await asyncio.sleep(1000 if completions == ["hang"] else 0.001)
    return [random.random() + len(text) for text in completions]


def test_an_async_function_is_awaited_within_the_limits(scored: Any) -> None:
    def scores() -> RewardScores:
        random.seed(1)
        return scored(["a", "hang", "abc"], patient)

    found = scores()
    assert [int(total) for total in found.total.tolist()] == [1, -1, 3]
    assert [(call.index, call.failure.kind) for call in found.failed_calls] == [(1, "time")]
    assert found.total.tolist() == scores().total.tolist()


def test_random_rewards_depend_on_the_random_state_of_the_run_alone(scored: Any) -> None:
    """A resumed run has other workers, and they finish in another order."""

    def rewards(seed: int) -> list[float]:
        random.seed(seed)
        return scored(["a"] * 8, noisy_digits).total.tolist()

    one, again, other = rewards(1), rewards(1), rewards(2)
    assert one == again
    assert len({*one, *other}) == 16


def test_functions_that_no_module_has(scored: Any) -> None:
    bonus = 2.5
    scores = scored(["a"], lambda completions, **columns: [bonus for _ in completions])
    assert scores.total.tolist() == [2.5]


def test_a_function_that_cannot_be_pickled(scored: Any) -> None:
    lock = threading.Lock()

    def locked(completions: Any) -> list[float]:
        with lock:
            return [1.0 for _ in completions]

    with pytest.raises(TypeError, match=r"cannot pickle '_thread.lock'.*limits.workers=0"):
        scored(["a"], locked)


def test_a_message_says_what_the_functions_are() -> None:
    with pytest.raises(TypeError, match="the environments cannot be sent to another process"):
        client.Sandbox([threading.Lock()], TIGHT, 1, "environments").start()


class Unloadable:
    def __init__(self, ends: bool) -> None:
        self.ends = ends

    def __call__(self, completions: Any) -> list[float]:
        return []

    def warm_up(self) -> None:
        if self.ends:
            os._exit(3)
        raise ImportError("no module named 'nowhere'")


@pytest.mark.parametrize(
    ("ends", "message"), [(False, "no module named 'nowhere'"), (True, "exit code 3")]
)
def test_functions_that_cannot_be_loaded(ends: bool, message: str, scored: Any) -> None:
    with pytest.raises(RuntimeError, match=message):
        scored(["a"], Unloadable(ends))


def test_from_a_thread_and_without_the_alarm(scored: Any) -> None:
    found: list[RewardScores] = []
    before = signal.getsignal(signal.SIGALRM), signal.setitimer(signal.ITIMER_REAL, 1000.0)
    thread = threading.Thread(target=lambda: found.append(scored(["sleep", "good"])))
    thread.start()
    thread.join()
    left = signal.setitimer(signal.ITIMER_REAL, 0.0)
    assert signal.getsignal(signal.SIGALRM) == before[0]
    assert 0 < left[0] < 1000.0
    assert found[0].total.tolist() == [-1.0, 1.0]


@pytest.fixture
def rewards() -> Iterator[RewardSum]:
    """With a server that has run a call."""
    rewards = RewardSum([length], limits=TIGHT)
    assert rewards.score(["?"], ["four"], {}).total.tolist() == [4.0]
    yield rewards
    rewards.stop()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_server_that_is_killed_or_does_not_answer_is_replaced(
    how: signal.Signals, rewards: RewardSum, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_SILENCE_SECONDS", 5.0)
    monkeypatch.setattr(client, "_END_SECONDS", 0.5)
    for _ in range(2):
        assert rewards._sandbox is not None
        server = rewards._sandbox._server
        assert server is not None
        os.kill(server.pid, how)
        assert rewards.score(["?"], ["four"], {}).total.tolist() == [4.0]
        assert not is_alive(server.pid)


class KillsOnce:
    """Kills its own process or the server the first time."""

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


def kills_server(completions: Sequence[str], **columns: Any) -> list[float]:
    if completions == ["kill"]:
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(1000)
    return [1.0 for _ in completions]


def test_a_call_that_always_kills_the_server_fails(scored: Any) -> None:
    limits = RewardLimits(seconds=120.0, failure_value=-1.0, workers=1)
    scores = scored(["a", "kill", "b"], kills_server, limits)
    assert scores.total.tolist() == [1.0, -1.0, 1.0]
    assert [call.failure.kind for call in scores.failed_calls] == ["died"]


TRAINER = """
import sys
from prl_lightning.rewards import RewardLimits, RewardSum

PIDS = sys.argv[1]

def hang(completions):
    import os, subprocess, time
    child = subprocess.Popen(["sleep", "1000"])
    alone = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    # The parent of this one ends at once.
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
