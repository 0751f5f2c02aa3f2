"""math-verify within limits: memory, its own errors, and answers that are meant to hurt."""

from __future__ import annotations

import os
import time
import traceback
import weakref
from collections.abc import Sequence
from typing import Any

import pytest

from prl_lightning.rewards import MathReward, RewardLimits, RewardSum, equality, worker_process
from rewards.hostile import HOSTILE
from rewards.orders import PATIENT_256


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


def test_what_an_error_keeps_alive_is_let_go_before_it_is_described(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where memory is short, there is none for the words otherwise."""
    kept: list[weakref.ref[Any]] = []

    def fill() -> None:
        large = {1, 2, 3}
        kept.append(weakref.ref(large))
        raise MemoryError

    def shown(error: BaseException, limit: int) -> list[str]:
        assert kept[0]() is None
        return format_exception(error, limit=limit)

    format_exception = traceback.format_exception
    monkeypatch.setattr(traceback, "format_exception", shown)
    try:
        try:
            fill()
        except MemoryError as cause:
            raise RuntimeError("no room") from cause
    except RuntimeError as error:
        described = worker_process._described(error)
    assert (described["kind"], described["message"]) == ("RuntimeError", "no room")
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
