"""Reward functions in processes that can be killed, with functions that ask for it."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from prl_lightning.rewards import (
    MathReward,
    RewardLimits,
    RewardScores,
    RewardSum,
    equality,
    fork_server,
    worker_process,
)
from prl_lightning.rewards.answers import GroupAnswers
from rewards.hostile import HOSTILE

TIGHT = RewardLimits(seconds=2.0, memory_mib=256, failure_value=-1.0, workers=2)
PATIENT_256 = RewardLimits(seconds=120.0, memory_mib=256, failure_value=-1.0, workers=2)
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
            case ["busy", seconds]:
                end = time.process_time() + float(seconds)
                while time.process_time() < end:
                    pass
                values.append(1.0)
            case ["run", seconds]:
                code = f"import time\nwhile time.process_time() < {seconds}: pass"
                subprocess.run([sys.executable, "-S", "-c", code], check=True)
                values.append(1.0)
            case ["raise"]:
                raise KeyError("no such thing")
            case ["spawn", file]:
                children = [
                    subprocess.Popen(["sleep", "1000"], start_new_session=alone)
                    for alone in (False, True)
                ]
                Path(file).write_text(" ".join(map(str, [os.getpid(), *pids_of(children)])))
                children[0].wait()
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


def pids_of(children: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    return [child.pid for child in children]


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
    processes = list(map(int, (tmp_path / "pids").read_text().split()))
    assert len(processes) == 3
    assert wait_until(lambda: not any(map(is_alive, processes)))


@pytest.mark.parametrize("how", ["busy", "run"])
def test_calls_that_take_a_part_of_their_limit_are_all_judged(how: str, scored: Any) -> None:
    """Whether they compute themselves or a child does, and whoever else wants the cores."""
    scores = scored([f"{how} 0.3"] * 40)
    assert scores.total.tolist() == [1.0] * 40


def test_a_call_that_had_to_let_others_go_first_is_judged_in_the_end(scored: Any) -> None:
    """It takes longer than any before it, and the others take longer than its limit."""
    texts = ["busy 0.01"] * 10 + ["busy 0.8"] * 4 + ["busy 0.02"] * 400
    limits = RewardLimits(seconds=3.0, workers=2)
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


class Fills(MathReward):
    """math-verify takes all memory, by small things; some of it catches the error, as its own."""

    def __init__(self, catches: bool) -> None:
        super().__init__()
        self.catches = catches

    def warm_up(self) -> None:
        super().warm_up()
        import math_verify

        def verify(*args: Any, **options: Any) -> bool:
            kept: list[Any] = []
            try:
                while True:
                    kept.append([None] * 50)
            except MemoryError:
                if not self.catches:
                    raise
            return False

        math_verify.verify = verify


@pytest.mark.parametrize("catches", [False, True])
def test_memory_that_math_verify_lacks_is_no_wrong_answer(catches: bool, scored: Any) -> None:
    scores = scored([r"\boxed{1}", r"\boxed{2}", r"\boxed{1}"], Fills(catches), PATIENT_256)
    assert scores.total.tolist() == [1.0, -1.0, 1.0]
    assert [call.failure.kind for call in scores.failed_calls] == ["memory"]


def test_what_an_error_keeps_alive_is_let_go_before_it_is_described() -> None:
    """Where memory is short, there is none for the words otherwise."""
    kept: list[weakref.ref[Any]] = []

    def fill() -> None:
        large = {1, 2, 3}
        kept.append(weakref.ref(large))
        raise MemoryError

    try:
        fill()
    except MemoryError as error:
        described = worker_process._described(error)
        assert kept[0]() is None
    assert described["kind"] == "MemoryError"
    assert "in fill" in described["traceback"]


class Keeps:
    """Keeps what calls after the first have allocated, and says in which process."""

    def __init__(self) -> None:
        self.kept: list[bytearray] = []

    def __call__(self, completions: Sequence[str], **columns: Any) -> list[float]:
        self.kept += [bytearray(int(text) << 20) for text in completions]
        return [float(os.getpid())]


@pytest.mark.parametrize(("sizes", "processes"), [([100, 1, 1], 1), ([1, 150, 1], 2)])
def test_a_worker_with_little_memory_left_is_replaced(sizes: list[int], processes: int) -> None:
    """Not for what its first call leaves: a model that is loaded then would be loaded each time."""
    limits = RewardLimits(seconds=120.0, memory_mib=256, workers=1)
    rewards = RewardSum([Keeps()], limits=limits)  # one by one, or the next gets another worker
    used = [rewards.score(["?"], [str(size)], {}).total.item() for size in sizes]
    rewards.stop()
    assert len(set(used)) == processes


class Divides(MathReward):
    """math-verify raises."""

    def warm_up(self) -> None:
        super().warm_up()
        import math_verify

        def verify(*args: Any, **options: Any) -> bool:
            raise ZeroDivisionError("by nothing")

        math_verify.verify = verify


def test_an_error_of_math_verify_is_a_failed_call_and_too_large_an_answer_is_none(
    scored: Any,
) -> None:
    texts = [r"\boxed{1}", r"\boxed{2}", r"\boxed{9^{9^{9^9}}}"]
    scores = scored(texts, Divides(), PATIENT_256)
    assert scores.total.tolist() == [1.0, -1.0, 0.0]
    (call,) = scores.failed_calls
    assert (call.index, call.failure.kind) == (1, "ZeroDivisionError")
    assert "in verify" in call.failure.traceback
    assert scores.failures == {"Divides": 2}


class Broken(MathReward):
    """A math-verify that finds nothing equal."""

    def warm_up(self) -> None:
        import math_verify

        math_verify.verify = lambda *args, **options: False
        super().warm_up()


def test_a_broken_math_verify_is_said_before_anything_is_judged(scored: Any) -> None:
    with pytest.raises(RuntimeError, match="math-verify does not find '12' and '12.0' equal"):
        scored([r"\boxed{1}"], Broken())


class Unguarded(MathReward):
    """Asks math-verify about everything."""

    def warm_up(self) -> None:
        super().warm_up()
        equality._is_unreasonable = lambda answer: False


@pytest.mark.parametrize("function", [MathReward(), Unguarded()])
def test_hostile_answers_cost_at_most_their_limit(function: MathReward, scored: Any) -> None:
    """Right answers between them stay right."""
    texts = [text for answer in HOSTILE.values() for text in (rf"\boxed{{{answer}}}", r"\boxed{1}")]
    limits = RewardLimits(seconds=4.0, workers=2)
    start = time.monotonic()
    scores = scored(texts, function, limits)
    taken = time.monotonic() - start
    assert len(HOSTILE) >= 40
    assert scores.total[1::2].tolist() == [1.0] * len(HOSTILE)
    named = dict(zip(HOSTILE, scores.total[::2].tolist(), strict=True))
    right = {name for name, value in named.items() if value}
    assert right == {"a megabyte of spaces", "boxes in boxes"}
    # No more than if each that was killed had had a core for its limit; loading takes the rest.
    late = sum(call.failure.kind == "time" for call in scores.failed_calls)
    assert taken < (late + 2) * limits.seconds / 2 + 30.0
    print(f"{late} of {len(HOSTILE)} were killed for their time, in {taken:.1f} s")


@pytest.mark.parametrize(
    ("field", "value"),
    [("seconds", 0), ("seconds", float("inf")), ("memory_mib", -1), ("max_failures", 1.5),
     ("workers", -1), ("failure_value", float("nan"))],
)  # fmt: skip
def test_limits_out_of_range(field: str, value: float) -> None:
    settings: Any = {field: value}
    with pytest.raises(ValueError, match=f"limits.{field}={value}"):
        RewardLimits(**settings)
