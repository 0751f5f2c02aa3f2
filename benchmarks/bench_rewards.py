"""What hanging completions cost the others: math-verify on answers, and 5% that hang.

    python benchmarks/bench_rewards.py --out benchmarks/results/rewards.json

Those that hang wait (as code that was told to sleep does) or compute (as sympy on a power of a sum
does, with a core each). Rates are right completions judged as such, a second.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from prl_lightning.rewards import MathReward, RewardLimits, RewardSum
from report import publish

COMPUTES = r"\boxed{(1+x)^{100000}}"
WAITS = "wait"

# Pairs that are equal, and not by their letters.
PAIRS = [
    (r"\frac{{{b}}}{{{a}}}", r"\frac{{2 \cdot {b}}}{{2 \cdot {a}}}"),
    (r"{a}\sqrt{{3}}", r"\sqrt{{3 \cdot {a}^2}}"),
    (r"x^2 + {a}x + {b}", r"{b} + x^2 + {a}x"),
    (r"\frac{{\pi}}{{{a}}}", r"2\pi / ({a} \cdot 2)"),
    (r"({a}, {b}, {c})", r"({a}.0, {b}, \frac{{2 \cdot {c}}}{{2}})"),
    (r"\left({a}, {c}\right]", r"({a}.0, {c}]"),
]


class WaitingMathReward(MathReward):
    """Takes forever where it is told to."""

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], *args: Any, **columns: Any
    ) -> list[float | None]:
        if completions == [WAITS]:
            time.sleep(1e6)
        return super().__call__(prompts, completions, *args, **columns)


def rate(rewards: RewardSum, number: int, share: float = 0.0, hanging: str = "") -> float:
    """No two answers are alike, so that nothing is remembered."""
    every = round(1 / share) if share else number + 1
    texts, answers = [], []
    for i in range(number):
        gold, answer = PAIRS[i % len(PAIRS)]
        numbers = {"a": i + 2, "b": 2 * i + 5, "c": 3 * i + 8}
        answers.append(gold.format(**numbers))
        is_hanging = i % every == every - 1
        texts.append(hanging if is_hanging else rf"\boxed{{{answer.format(**numbers)}}}")
    start = time.monotonic()
    scores = rewards.score(["?"] * number, texts, {"answer": answers})
    taken = time.monotonic() - start
    right = number - texts.count(hanging)
    assert scores.total.sum() == right, scores.failures
    return right / taken


def main() -> None:
    parser = argparse.ArgumentParser(description="What hanging completions cost the others.")
    parser.add_argument("--completions", type=int, default=2048)
    parser.add_argument("--seconds", type=float, default=1.0, help="limit of a completion")
    parser.add_argument("--share", type=float, default=0.05, help="of those that hang")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    rows = []
    for repeat in range(args.repeats):  # in turn: the machine drifts
        limits = RewardLimits(seconds=args.seconds)
        rewards = RewardSum([WaitingMathReward()], limits=limits)
        rate(rewards, 64)  # loads the verifier
        rows.append(
            [
                rate(rewards, args.completions),
                rate(rewards, args.completions, args.share, WAITS),
                rate(rewards, args.completions, args.share, COMPUTES),
            ]
        )
        rewards.stop()
        print(repeat, [round(value) for value in rows[-1]], flush=True)
    publish(
        {
            "completions": args.completions,
            "limit_seconds": args.seconds,
            "share_hanging": args.share,
            "per_second": round(median(row[0] for row in rows)),
            "rate_with_waiting": round(median(row[1] / row[0] for row in rows), 3),
            "rate_with_computing": round(median(row[2] / row[0] for row in rows), 3),
        },
        args.out,
    )


if __name__ == "__main__":
    main()
