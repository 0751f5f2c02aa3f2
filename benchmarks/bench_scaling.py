"""Seconds of an iteration at 1x, 2x and 4x the prompts, and at 1x, 2x and 4x the length.

    python benchmarks/bench_scaling.py --out benchmarks/results/scaling.json

One process each, in turn; the sizes are those of 1x.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from pathlib import Path

from report import publish
from turns import in_turn
from work import add_arguments, sizes_of, work_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--iterations", default=3, type=int, help="of each process")
    parser.add_argument("--rounds", default=2, type=int)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    base = work_of(args)
    works = {"1x": base}
    for factor in (2, 4):
        works[f"{factor}x prompts"] = replace(base, prompts=factor * base.prompts)
        works[f"{factor}x length"] = replace(base, max_new_tokens=factor * base.max_new_tokens)
    commands = {
        name: ["bench_step.py", *sizes_of(work), "--iterations", str(args.iterations)]
        for name, work in works.items()
    }
    results = in_turn(commands, args.rounds)
    seconds = {
        name: statistics.median([s for run in runs for s in run["iterations"]])
        for name, runs in results.items()
    }
    tokens = {
        name: statistics.median([run["tokens_per_second"] for run in runs])
        for name, runs in results.items()
    }
    result = {
        "work": vars(base),
        "seconds": seconds,
        "ratio_of_seconds": {name: value / seconds["1x"] for name, value in seconds.items()},
        "tokens_per_second": tokens,
    }
    publish(result, args.out)


if __name__ == "__main__":
    main()
