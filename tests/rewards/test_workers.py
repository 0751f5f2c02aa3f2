"""Reward functions in processes that can be killed, with functions that ask for it."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from noisy import noisy_digits
from prl_lightning.rewards import RewardLimits, RewardScores, RewardSum
from rewards.orders import PATIENT, Whole, is_alive, length, wait_until


def test_values_are_those_of_a_call_here(scored: Any) -> None:
    texts = ["a" * n for n in range(50)]
    here = RewardSum([length]).score(["?"] * 50, texts, {})
    assert scored(texts, length).total.tolist() == here.total.tolist()


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("sleep", "time"),
        ("compute", "time"),
        ("fill", "memory"),
        ("exit", "died"),
        ("crash", "died"),
        ("quit", "SystemExit"),
        ("raise", "KeyError"),
        ("nan", "ValueError"),
        ("text", "ValueError"),
    ],
)
def test_a_failure_is_counted_named_and_the_others_are_judged(
    text: str, kind: str, scored: Any
) -> None:
    scores = scored(["good", text, "none", "good"])
    assert scores.total.tolist() == [1.0, -1.0, 0.0, 1.0]
    (call,) = scores.failed_calls
    assert (call.name, call.index, call.failure.kind) == ("obey", 1, kind)
    assert scores.failures == {"obey": 1}
    assert ("raise KeyError" in call.failure.traceback) == (text == "raise")


def test_what_a_killed_call_has_started_is_killed_too(scored: Any, tmp_path: Path) -> None:
    scored([f"spawn {tmp_path / 'pids'}"])
    processes = list(map(int, (tmp_path / "pids").read_text().split()))
    assert len(processes) == 3
    assert wait_until(lambda: not any(map(is_alive, processes)))


@pytest.mark.parametrize("how", ["busy", "run"])
def test_calls_that_take_a_part_of_their_limit_are_all_judged(how: str, scored: Any) -> None:
    """Whether they compute themselves or a child does, and whoever else wants the cores."""
    # Longer in all than the limit, which leaves each of them ten times what it takes.
    limits = RewardLimits(seconds=4.0, memory_mib=256, workers=2)
    scores = scored([f"{how} 0.4"] * 40, limits=limits)
    assert scores.total.tolist() == [1.0] * 40


def test_a_call_that_had_to_let_others_go_first_is_judged_in_the_end(scored: Any) -> None:
    """It takes longer than any before it, and the others take longer than its limit."""
    texts = ["busy 0.01"] * 10 + ["busy 0.8"] * 4 + ["busy 0.02"] * 600
    limits = RewardLimits(seconds=5.0, workers=2)
    assert scored(texts, limits=limits).total.tolist() == [1.0] * len(texts)


def test_of_those_that_compute_forever_only_some_are_tried_again(scored: Any) -> None:
    start = time.monotonic()
    scores = scored(["good"] * 10 + ["compute"] * 16 + ["busy 0.02"] * 100)
    assert scores.total.tolist() == [1.0] * 10 + [-1.0] * 16 + [1.0] * 100
    # A core each would take 16 s, a second attempt for each as much again.
    assert time.monotonic() - start < 14.0


def test_more_hanging_calls_than_workers_do_not_stall_the_others(
    scored: Any, tmp_path: Path
) -> None:
    """Twenty that wait for each other, on two workers: they only end if all of them have begun."""
    scores = scored([f"meet {tmp_path} 20"] * 20 + ["good"] * 20, limits=PATIENT)
    assert scores.total.tolist() == [2.0] * 20 + [1.0] * 20


def test_a_call_put_aside_does_not_slow_down_its_successors(scored: Any) -> None:
    """A worker whose priority was lowered is not used again."""
    scores = scored(["good", "compute", "sleep"] + ["priority"] * 200)
    assert scores.total.tolist()[3:] == [float(os.getpriority(os.PRIO_PROCESS, 0))] * 200


def test_one_that_needs_all_completions_gets_them(scored: Any) -> None:
    assert scored(["a", "b", "c"], Whole()).total.tolist() == [3.0, 2.0, 1.0]


def test_random_rewards_depend_on_the_random_state_of_the_run_alone(scored: Any) -> None:
    """A run that is continued has other workers, and they finish in another order."""

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


def test_what_cannot_be_sent_says_so(scored: Any) -> None:
    lock = threading.Lock()

    def locked(completions: Any) -> list[float]:
        with lock:
            return [1.0 for _ in completions]

    with pytest.raises(TypeError, match="cannot be sent to a process.*limits.workers=0"):
        scored(["a"], locked)


class CannotBeLoaded:
    def __call__(self, completions: Any) -> list[float]:
        return []

    def warm_up(self) -> None:
        raise ImportError("no module named 'nowhere'")


def test_what_cannot_be_loaded_says_so(scored: Any) -> None:
    with pytest.raises(RuntimeError, match="no module named 'nowhere'"):
        scored(["a"], CannotBeLoaded())


def test_from_a_thread_and_without_the_alarm(scored: Any) -> None:
    found: list[RewardScores] = []
    before = signal.getsignal(signal.SIGALRM), signal.setitimer(signal.ITIMER_REAL, 100.0)
    thread = threading.Thread(target=lambda: found.append(scored(["sleep", "good"])))
    thread.start()
    thread.join()
    left = signal.setitimer(signal.ITIMER_REAL, 0.0)
    assert signal.getsignal(signal.SIGALRM) == before[0]
    assert 0 < left[0] < 100.0
    assert found[0].total.tolist() == [-1.0, 1.0]


@pytest.mark.parametrize(
    ("field", "value"),
    [("seconds", 0), ("seconds", float("inf")), ("memory_mib", -1), ("max_failures", 1.5),
     ("workers", -1), ("failure_value", float("nan"))],
)  # fmt: skip
def test_limits_out_of_range(field: str, value: float) -> None:
    settings: Any = {field: value}
    with pytest.raises(ValueError, match=f"limits.{field}={value}"):
        RewardLimits(**settings)
