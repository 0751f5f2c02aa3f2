"""Time limits, the two passes, and which failures are reported; orders.py has the functions."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from prl_lightning.rewards import RewardLimits
from rewards.orders import PATIENT, is_alive, obey, wait_until

pytestmark = pytest.mark.process


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("sleep", "time", "waited for more than 2 s"),
        ("compute", "time", "more than 1 s of processor time"),
        ("run 1e9", "time", "more than 1 s of processor time"),
        ("fill", "memory", "more than 256 MiB"), ("exit", "died", ""), ("crash", "died", ""),
        ("quit", "SystemExit", ""), ("raise", "KeyError", "no such thing"),
        ("nan", "ValueError", "nan"), ("text", "ValueError", "'one'"),
        ("object", "AttributeError", "'object' object has no"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:1 of 4 completions got no reward")
def test_a_failure_is_recorded_and_changes_no_other_result(
    text: str, kind: str, message: str, scored: Any
) -> None:
    scores = scored(["good", text, "none", "good"])
    assert scores.total.tolist() == [1.0, -1.0, 0.0, 1.0]
    (call,) = scores.failed_calls
    assert (call.name, call.index, call.failure.kind) == ("obey", 1, kind)
    assert message in call.failure.message
    assert scores.failures == {"obey": 1}
    assert ("raise KeyError" in call.failure.traceback) == (text == "raise")


def test_what_a_killed_call_has_started_is_killed_too(scored: Any, tmp_path: Path) -> None:
    scored([f"log {tmp_path / 'log'} spawn {tmp_path / 'pids'}"])
    started = (tmp_path / "pids").read_text().split()
    processes = [*map(int, started), *runs(tmp_path / "log")]
    assert wait_until(lambda: not any(map(is_alive, processes)))


@pytest.fixture
def busy_machine() -> Iterator[None]:
    """Two processes that compute for as long as the test takes."""
    loops = [subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) for _ in range(2)]
    yield
    for loop in loops:
        loop.kill()
        loop.wait()


@pytest.mark.usefixtures("busy_machine")
@pytest.mark.parametrize("how", ["busy", "run"])
def test_calls_that_take_a_part_of_their_limit_are_all_judged(how: str, scored: Any) -> None:
    """The part is more than the short limit."""
    limits = RewardLimits(seconds=2.0, memory_mib=256, workers=2)
    scores = scored([f"{how} 0.4"] * 20, limits=limits)
    assert scores.total.tolist() == [1.0] * 20


@pytest.mark.usefixtures("busy_machine")
@pytest.mark.parametrize("how", ["busy 0.3", "run 0.3", "thread busy 0.3"])
def test_time_without_a_core_does_not_count(how: str, scored: Any) -> None:
    """Each call gets a tenth of a core, and so takes about 3 s, longer than both of its clocks."""
    limits = RewardLimits(seconds=0.6, memory_mib=256, workers=1)
    assert scored([f"nice {how}"], limits=limits).total.tolist() == [1.0]


def runs(log: Path) -> list[int]:
    """The processes of calls that logged their runs."""
    return list(map(int, log.read_text().split()))


def test_calls_that_hang_run_again_until_some_in_a_row_hang_again(
    scored: Any, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    hanging = [f"log {log} compute"] * 12
    scores = scored(["good", "good", *hanging, *["busy 0.02"] * 20])
    assert scores.total.tolist() == [1.0] * 2 + [-1.0] * 12 + [1.0] * 20
    again = len(runs(log)) - 12
    assert 2 <= again <= 3  # the third may begin between the timeouts of the two others
    given_up = [call for call in scores.failed_calls if "2 calls" in call.failure.message]
    assert len(given_up) == 12 - again


class Loads:
    """Returns early for some texts, and loads something slow for the others."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.is_loaded = False

    def __call__(self, completions: Sequence[str], **columns: Any) -> list[float]:
        if not self.is_loaded and completions != ["early"]:
            obey(["busy 0.25"])
            self.is_loaded = True
        return obey([f"log {self.log} {text}" for text in completions])


def test_a_call_in_a_new_process_has_time_to_load(scored: Any, tmp_path: Path) -> None:
    """Once a call has loaded in time, no call runs twice but the one that hangs."""
    limits = RewardLimits(seconds=1.0, failure_value=-1.0, workers=1)
    texts = ["good", "early", "sleep", *["early", "good"] * 4]
    scores = scored(texts, Loads(tmp_path / "log"), limits)
    assert scores.total.tolist() == [1.0, 1.0, -1.0] + [1.0] * 8
    assert len(runs(tmp_path / "log")) == len(texts) + 1


class DiesWhenUsed:
    """Exits in a process that has run a call before."""

    is_used = False

    def __call__(self, completions: Sequence[str], **columns: Any) -> list[float]:
        if self.is_used:
            os._exit(3)
        self.is_used = True
        return [1.0 for _ in completions]


class Keeps:
    """Keeps memory from call to call."""

    def __init__(self) -> None:
        self.kept: list[bytearray] = []

    def __call__(self, completions: Sequence[str], **columns: Any) -> list[float]:
        self.kept += [bytearray(150 << 20) for _ in completions]
        return [1.0 for _ in completions]


@pytest.mark.parametrize("function", [DiesWhenUsed(), Keeps()])
def test_a_call_that_dies_or_lacks_memory_runs_again_in_a_new_process(
    function: Any, scored: Any
) -> None:
    limits = RewardLimits(seconds=120.0, memory_mib=256, failure_value=-1.0, workers=1)
    assert scored(["a", "b"], function, limits).total.tolist() == [1.0, 1.0]


def test_processes_are_kept_from_call_to_call(scored: Any, tmp_path: Path) -> None:
    scored([f"log {tmp_path / 'log'} good"] * 20, limits=PATIENT)
    processes = runs(tmp_path / "log")
    assert len(processes) == 20
    assert len(set(processes)) <= PATIENT.workers
