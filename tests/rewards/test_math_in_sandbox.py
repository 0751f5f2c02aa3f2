"""MathReward in the sandbox: errors inside math-verify, and hostile answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from prl_lightning.rewards import MathReward, RewardLimits, equality
from rewards.hostile import HOSTILE
from rewards.orders import PATIENT

pytestmark = pytest.mark.process


class Patched(MathReward):
    """With another function in the place of math-verify's."""

    def __init__(self, verify: Callable[..., bool]) -> None:
        super().__init__()
        self.verify = verify

    def warm_up(self) -> None:
        super().warm_up()
        import math_verify

        math_verify.verify = self.verify


def fills_memory(*args: Any, **options: Any) -> bool:
    kept: list[Any] = []
    while True:
        kept.append([None] * 50)


def fills_memory_and_goes_on(*args: Any, **options: Any) -> bool:
    try:
        return fills_memory()
    except MemoryError:
        return False


def divides(*args: Any, **options: Any) -> bool:
    return 1 / 0 > 0


@pytest.mark.parametrize(
    ("verify", "kind"),
    [
        (fills_memory, "memory"),
        (fills_memory_and_goes_on, "memory"),
        (divides, "ZeroDivisionError"),
    ],
)
def test_an_error_inside_math_verify_is_a_failed_call(verify: Any, kind: str, scored: Any) -> None:
    """An answer that is too large for math-verify is a wrong answer."""
    texts = [r"\boxed{1}", r"\boxed{2}", r"\boxed{9^{9^{9^9}}}", r"\boxed{1}"]
    scores = scored(texts, Patched(verify), PATIENT)
    assert scores.total.tolist() == [1.0, -1.0, 0.0, 1.0]
    (call,) = scores.failed_calls
    assert (call.index, call.failure.kind) == (1, kind)
    assert scores.failures == {"Patched": 2}
    assert ("in divides" in call.failure.traceback) == (verify is divides)


class Unguarded(MathReward):
    """Gives math-verify every answer."""

    def warm_up(self) -> None:
        super().warm_up()
        equality._is_unreasonable = lambda answer: False


@pytest.mark.parametrize(
    "function", [MathReward(), pytest.param(Unguarded(), marks=pytest.mark.slow)]
)
def test_hostile_answers_change_no_other_result(function: MathReward, scored: Any) -> None:
    texts = [text for answer in HOSTILE.values() for text in (rf"\boxed{{{answer}}}", r"\boxed{1}")]
    scores = scored(texts, function, RewardLimits(seconds=2.0, workers=2))
    assert len(HOSTILE) >= 40
    assert scores.total[1::2].tolist() == [1.0] * len(HOSTILE)
    named = dict(zip(HOSTILE, scores.total[::2].tolist(), strict=True))
    right = {name for name, value in named.items() if value}
    assert right == {"a megabyte of spaces", "boxes in boxes"}
