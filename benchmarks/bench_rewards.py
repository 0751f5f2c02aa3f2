"""Measure how much completions that hang slow down the others, with math-verify.

    python benchmarks/bench_rewards.py --out benchmarks/results/rewards.json

5% of the completions hang: they wait (like a sleep), they compute forever (like sympy at times) or
are the tests' hostile answers, most of which MathReward refuses up front. The rates are correct
completions per second: over the whole time, and up to the last correct completion. The time after
that is the tail: completions that hang run again under the full limit. The tail is as long for a
hundred completions as for a million.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from runpy import run_path
from statistics import median
from typing import Any

from sympy import Symbol

from prl_lightning.rewards import MathReward, RewardLimits, RewardSum
from report import publish

COMPUTES = "compute"
WAITS = "wait"
TESTS = Path(__file__).parents[1] / "tests"
HOSTILE = run_path(str(TESTS / "rewards" / "hostile.py"))["HOSTILE"].values()
# Replace correct completions.
HANGING = {
    "waiting": [WAITS],
    "computing": [COMPUTES],
    "hostile": [rf"\boxed{{{answer}}}" for answer in HOSTILE],
}

# Equal answers with different texts, in forms that the warm-up does not cover.
PAIRS = [
    (r"{a}\pi + {b}", r"{b} + \pi \cdot {a}"),
    (r"\frac{{{a}\sqrt{{2}}}}{{{p}}}", r"\sqrt{{2}} \cdot \frac{{{a}}}{{{p}}}"),
    (r"\log_{{2}}({a})", r"\frac{{\ln {a}}}{{\ln 2}}"),
    (r"{a}n(n+{b})", r"n^2 \cdot {a} + {ab}n"),
    (r"\left\{{{a}, {b}, {c}\right\}}", r"\{{{c}, {b}, \frac{{{a}}}{{1}}\}}"),
    (r"{a} + {b}i", r"{b}i + {a}"),
    (r"2^{{{a}}}", r"4 \cdot 2^{{{a} - 2}}"),
    (r"y = {a}x - {b}", r"{a}x - y = {b}"),
    (r"[-{a}, {b})", r"\left[-{a}, {b}.0\right)"),
    (r"\frac{{{a}}}{{x + {b}}}", r"{a}(x + {b})^{{-1}}"),
    (r"\sin({a})", r"\cos(\frac{{\pi}}{{2}} - {a})"),
]


class TimedMathReward(MathReward):
    """The reward of a correct answer is the seconds since the start; hangs if told to."""

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], *args: Any, **columns: Any
    ) -> list[float | None]:
        if completions == [WAITS]:
            time.sleep(1e6)
        while completions == [COMPUTES]:
            ((1 + Symbol("x")) ** 1000).expand()
        values = super().__call__(prompts, completions, *args, **columns)
        since = time.monotonic() - columns["started"][0]
        return [value and since for value in values]


@dataclass
class Taken:
    """Number of correct completions, seconds until the last one is judged, seconds in all."""

    right: int
    steady: float
    whole: float

    def rates(self) -> tuple[float, float]:
        return self.right / self.whole, self.right / self.steady


def problems(number: int) -> tuple[list[str], list[str]]:
    """Correct boxed answers and their references, all different."""
    texts, golds = [], []
    for i in range(number):
        gold, answer = PAIRS[i % len(PAIRS)]
        numbers = {"a": i + 2, "b": 2 * i + 5, "c": 3 * i + 8, "p": 2 * i + 7}
        numbers["ab"] = numbers["a"] * numbers["b"]
        golds.append(gold.format(**numbers))
        texts.append(rf"\boxed{{{answer.format(**numbers)}}}")
    return texts, golds


def judge(rewards: RewardSum, number: int, share: float = 0.0, kind: str = "") -> Taken:
    """Judge different answers, so that caches do not help."""
    texts, answers = problems(number)
    every = round(1 / share) if share else number + 1
    hung = range(every - 1, number, every)
    for i, text in zip(hung, cycle(HANGING.get(kind, [""])), strict=False):
        texts[i] = text
    start = time.monotonic()
    columns = {"answer": answers, "started": [start] * number}
    scores = rewards.score(["?"] * number, texts, columns)
    whole = time.monotonic() - start
    # All completions that hang are killed, and all others are correct.
    failed = [call.index for call in scores.failed_calls]
    kinds = {call.failure.kind for call in scores.failed_calls}
    if kind == "hostile":
        assert set(failed) <= set(hung)
        assert kinds <= {"time", "memory"}
    else:
        assert failed == list(hung)
        assert kinds <= {"time"}
    assert int((scores.total > 0).sum()) == number - len(hung)
    return Taken(number - len(hung), float(scores.total.max()), whole)


def main() -> None:
    parser = argparse.ArgumentParser(description="The cost of completions that hang.")
    parser.add_argument("--completions", type=int, default=2048)
    parser.add_argument("--seconds", type=float, nargs="+", default=[1.0, 5.0], help="limits")
    parser.add_argument("--share", type=float, default=0.05, help="of completions that hang")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    result: dict[str, Any] = {"completions": args.completions, "share_hanging": args.share}
    for seconds in args.seconds:
        rows = []
        for repeat in range(args.repeats):  # interleaved: the machine's speed drifts
            rewards = RewardSum([TimedMathReward()], limits=RewardLimits(seconds=seconds))
            judge(rewards, 64)  # loads the verifier
            row = [judge(rewards, args.completions)]
            row += [judge(rewards, args.completions, args.share, kind) for kind in HANGING]
            rewards.stop()
            rows.append(row)
            print(seconds, repeat, *row, flush=True)
        result[f"limit_{seconds:g}_seconds"] = summary(rows)
    publish(result, args.out)


def summary(rows: list[list[Taken]]) -> dict[str, float]:
    found: dict[str, float] = {"per_second": round(median(row[0].rates()[0] for row in rows))}
    for place, name in enumerate(HANGING, 1):
        for which, what in ((0, "rate"), (1, "steady_rate")):
            ratios = (row[place].rates()[which] / row[0].rates()[which] for row in rows)
            found[f"{what}_with_{name}"] = round(median(ratios), 3)
        tails = (row[place].whole - row[place].steady for row in rows)
        found[f"tail_seconds_with_{name}"] = round(median(tails), 2)
    return found


if __name__ == "__main__":
    main()
