"""Reward functions in processes that can be killed, with functions that ask for it."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from prl_lightning.rewards import MathReward, RewardLimits, RewardScores, RewardSum, equality
from prl_lightning.rewards.answers import GroupAnswers
from rewards.hostile import HOSTILE

TIGHT = RewardLimits(seconds=2.0, memory_mib=256, failure_value=-1.0, workers=2)
PATIENT = RewardLimits(seconds=120.0, failure_value=-1.0, workers=2)
BYTES = 8 << 30


def length(completions: Sequence[str], **columns: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def obey(completions: Sequence[str], **columns: Any) -> Any:
    """Do what the completion says."""
    values: list[Any] = []
    for text in completions:
        match text.split():
            case ["sleep"]:
                time.sleep(1000)
            case ["compute"]:
                values.append(10 ** (10**10))
            case ["fill"]:
                values.append(len(bytearray(BYTES)))
            case ["exit"]:
                os._exit(3)
            case ["crash"]:
                os.kill(os.getpid(), signal.SIGSEGV)
            case ["quit"]:
                sys.exit(0)
            case ["raise"]:
                raise KeyError("no such thing")
            case ["spawn", file]:
                child = subprocess.Popen(["sleep", "1000"])
                Path(file).write_text(f"{os.getpid()} {child.pid}")
                child.wait()
            case ["meet", folder, number]:
                (Path(folder) / str(os.getpid())).touch()
                while len(os.listdir(folder)) < int(number):
                    time.sleep(0.01)
                values.append(2.0)
            case ["nan"]:
                values.append(float("nan"))
            case ["text"]:
                values.append("one")
            case ["none"]:
                values.append(None)
            case ["priority"]:
                values.append(float(os.getpriority(os.PRIO_PROCESS, 0)))
            case _:
                values.append(1.0)
    return values


class Whole:
    """Wants all completions of a call."""

    needs_batch = True

    def __call__(self, completions: Sequence[str], **columns: Any) -> list[float]:
        return [len(completions) - rank for rank, _ in enumerate(completions)]


@pytest.fixture
def scored() -> Iterator[Callable[..., RewardScores]]:
    """Score texts by a function within limits; processes end with the test."""
    started: list[RewardSum] = []

    def score(
        texts: Sequence[str], function: Any = obey, limits: RewardLimits = TIGHT
    ) -> RewardScores:
        rewards = RewardSum([function], limits=limits)
        started.append(rewards)
        return rewards.score(["?"] * len(texts), texts, {"answer": ["1"] * len(texts)})

    yield score
    for rewards in started:
        rewards.stop()


def is_alive(process: int) -> bool:
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rsplit(")", 1)[1].split()[0] != "Z"


def wait_until(is_so: Callable[[], bool], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not is_so():
        time.sleep(0.05)
    return is_so()


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
    worker, child = map(int, (tmp_path / "pids").read_text().split())
    assert wait_until(lambda: not is_alive(worker) and not is_alive(child))


def test_more_hanging_calls_than_workers_do_not_stall_the_others(
    scored: Any, tmp_path: Path
) -> None:
    """Twenty that wait for each other, on two workers: they only end if all of them have begun."""
    scores = scored([f"meet {tmp_path} 20"] * 20 + ["good"] * 20, limits=PATIENT)
    assert scores.total.tolist() == [2.0] * 20 + [1.0] * 20


def test_a_call_put_aside_does_not_slow_down_its_successors(scored: Any) -> None:
    """A worker whose priority was lowered is not used again."""
    scores = scored(["sleep"] * 2 + ["priority"] * 10)
    assert scores.total.tolist()[2:] == [float(os.getpriority(os.PRIO_PROCESS, 0))] * 10


def test_one_that_needs_all_completions_gets_them(scored: Any) -> None:
    assert scored(["a", "b", "c"], Whole()).total.tolist() == [3.0, 2.0, 1.0]


def test_random_rewards_depend_on_the_random_state_of_the_run_alone(scored: Any) -> None:
    """A run that is continued has other workers, and they finish in another order."""
    # Here, for every server that loads this module would take seconds to load that one.
    from noisy import noisy_digits

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


def test_a_wrong_number_of_answers_is_a_failure() -> None:
    class Short:
        def __call__(self, completions: Sequence[str], **columns: Any) -> list[float]:
            return [0.0 for _ in completions]

        def answers(self, completions: Sequence[str]) -> list[int]:
            return [0]

    answers = compared(Short(), [["a", "b"], ["c"]])
    assert answers.numbers == [[0, 1], [0]]
    assert "answers() returned [0] for 2 completions" in answers.failures[0].message


class Stubborn(Whole):
    """A letter is an answer, and no two are compared beside what it is told to do."""

    def answers(self, completions: Sequence[str]) -> list[int]:
        if len(completions) > 1:
            obey(completions)
        return [0 if text else -1 for text in completions]


def compared(function: Any, groups: Any, left_out: Any = (), limits: Any = TIGHT) -> GroupAnswers:
    rewards = RewardSum([function], limits=limits)
    answers = rewards.answers(groups, left_out)
    rewards.stop()
    assert answers is not None
    return answers


def test_answers_that_cannot_be_compared_are_all_different_where_there_are_some() -> None:
    answers = compared(Stubborn(), [["a", "", "b"], ["raise", "", "b"]])
    assert answers.numbers == [[0, -1, 0], [0, -1, 1]]
    assert {group: failure.kind for group, failure in answers.failures.items()} == {1: "KeyError"}


def test_what_could_not_be_judged_does_not_spoil_its_group() -> None:
    """A majority of two against answers of their own, whatever would hang in comparing them."""
    groups = [["sleep", "a", "a", ""], ["a", "sleep", "sleep", "a"]]
    answers = compared(Stubborn(), groups, {(0, 0), (1, 1), (1, 2)})
    assert answers.numbers == [[1, 0, 0, -1], [0, 1, 2, 0]]
    assert answers.failures == {}


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
    import os, time
    open(PIDS, "w").write(f"{os.getpid()} {os.getppid()}")
    time.sleep(1000)

RewardSum([hang], limits=RewardLimits(seconds=1000.0, workers=1)).score(["?"], ["a"], {})
"""


def test_nothing_outlives_a_killed_trainer(tmp_path: Path) -> None:
    script, pids = tmp_path / "trainer.py", tmp_path / "pids"
    script.write_text(TRAINER)
    trainer = subprocess.Popen([sys.executable, str(script), str(pids)])
    assert wait_until(lambda: pids.exists() and len(pids.read_text().split()) == 2, 120)
    worker, server = map(int, pids.read_text().split())
    assert is_alive(worker)
    trainer.kill()
    trainer.wait()
    assert wait_until(lambda: not is_alive(worker) and not is_alive(server))


class Unguarded(MathReward):
    """Asks math-verify about everything."""

    def warm_up(self) -> None:
        super().warm_up()
        equality._is_unreasonable = lambda answer: False


@pytest.mark.parametrize("function", [MathReward(), Unguarded()])
def test_hostile_answers_cost_at_most_their_limit(function: MathReward, scored: Any) -> None:
    """Right answers between them stay right."""
    texts = [text for answer in HOSTILE.values() for text in (rf"\boxed{{{answer}}}", r"\boxed{1}")]
    scores = scored(texts, function, RewardLimits(seconds=4.0, workers=2))
    assert len(HOSTILE) >= 40
    assert scores.total[1::2].tolist() == [1.0] * len(HOSTILE)
    named = dict(zip(HOSTILE, scores.total[::2].tolist(), strict=True))
    right = {name for name, value in named.items() if value}
    assert right == {"a megabyte of spaces", "boxes in boxes"}


@pytest.mark.parametrize(
    ("field", "value"),
    [("seconds", 0), ("memory_mib", -1), ("max_failures", 1.5), ("workers", -1),
     ("failure_value", float("nan"))],
)  # fmt: skip
def test_limits_out_of_range(field: str, value: float) -> None:
    settings: Any = {field: value}
    with pytest.raises(ValueError, match=f"limits.{field}={value}"):
        RewardLimits(**settings)
