"""Does PRL do what the paper says? Every method on a small reasoning problem, five seeds each.

    python benchmarks/study/study.py            # goes on with what results.csv lacks, then reports
    python benchmarks/study/study.py --report   # the table and the picture alone

A finished run is a row of results.csv and its curves are rows of curves.csv; both are kept in the
repository. docs/study.md has the method and what came out.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from compare import report
from prl_lightning.arithmetic import ArithmeticTask, draw_problems
from prl_lightning.arithmetic.prepare import write_rows
from prl_lightning.runs.files import read_metrics

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RUNS = Path("runs/study")
RESULTS, CURVES = HERE / "results.csv", HERE / "curves.csv"

SEEDS = range(5)
SWEEP = (0.01, 0.03, 0.1, 0.3)  # of beta, where a method has its best
BETA = 0.1  # of the others
SAMPLES = 64  # of each held-out problem
TASK = ArithmeticTask(
    folder=str(RUNS / "task"),
    min_operations=8,
    max_operations=12,
    modulus=100,
    heldout_problems=64,
    error_rate=0.3,
    base_steps=1500,
)
LONGER = {"min_operations": 14, "max_operations": 16, "seed": 1, "modulus": TASK.modulus}
LONGER_PROBLEMS = 16


@dataclass(frozen=True)
class Run:
    """One row of the results.

    Attributes:
        method: a file of configs/methods, or "base" for the model that all start from.
        beta: weight of the KL; 0 where there is none.
        steps: of PRL, "" otherwise.
        seed: of the prompts' order and of sampling.
    """

    method: str
    beta: float = 0.0
    steps: str = ""
    seed: int = 0

    @property
    def name(self) -> str:
        return "-".join(str(value) for value in asdict(self).values() if value != "")

    def command(self) -> list[str]:
        """The command line, as a user has it."""
        word = "validate" if self.method == "base" else "fit"
        command = [sys.executable, "-m", "prl_lightning", word, "--config", f"{HERE}/study.yaml"]
        if self.method != "base":
            command += ["--config", f"{ROOT}/configs/methods/{self.method}.yaml"]
        if self.beta:
            command += ["--model.objective.beta", str(self.beta)]
        if self.steps:
            command += ["--model.objective.steps", self.steps]
        command += ["--seed_everything", str(self.seed), "--data.seed", str(self.seed)]
        return [*command, "--trainer.default_root_dir", str(RUNS / self.name)]


def plan() -> list[Run]:
    """All runs, seed by seed: what is there at any time can be compared."""
    variants: list[dict[str, Any]] = [{"method": "grpo"}, {"method": "raft"}]
    for beta in SWEEP:
        variants += [{"method": name, "beta": beta} for name in ("frpo", "grpo-kl-loss")]
    others = ("frpo-k3", "grpo-kl-reward-trajectory", "grpo-kl-reward-step")
    variants += [{"method": name, "beta": BETA} for name in others]
    variants += [{"method": "prl", "beta": BETA, "steps": size} for size in ("4", "16", "64")]
    variants += [{"method": "prl-newline", "beta": BETA, "steps": "newline"}]
    return [Run("base"), *(Run(**variant, seed=seed) for seed in SEEDS for variant in variants)]


def prepare() -> None:
    """Make the problems and the base model, once."""
    TASK()
    longer = RUNS / "longer.jsonl"
    if not longer.is_file():
        write_rows(longer, islice(draw_problems(**LONGER), LONGER_PROBLEMS))


def carry_out(run: Run, threads: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One run in a process of its own.

    Returns:
        Its row of the results, and its rows of the curves.

    Raises:
        RuntimeError: it failed; the message ends with what it printed last.
    """
    environment = {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": f"{HERE}:{ROOT}"}
    start = time.monotonic()
    done = subprocess.run(
        run.command(),
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{run.name} failed:\n{done.stdout[-2000:]}")
    seconds = time.monotonic() - start
    newest = max((RUNS / run.name).glob("version_*/metrics.csv"), key=os.path.getmtime)
    metrics = read_metrics(newest)
    return row_of(run, metrics, seconds), list(curves_of(run, metrics))


def row_of(run: Run, metrics: dict[str, Any], seconds: float) -> dict[str, Any]:
    """What is kept of a run; the mean over 64 samples stands for mean@16, whose value it is."""
    last = {name: values[-1] for name, (_, values) in metrics.items()}
    row: dict[str, Any] = asdict(run)
    for prefix, where in (("", "same"), ("longer_", "longer")):
        row |= {f"{prefix}mean@16": last[f"val/{where}/mean@{SAMPLES}"]}
        names = ("pass@16", "pass@64", "maj@16")
        row |= {f"{prefix}{name}": last[f"val/{where}/{name}"] for name in names}
    row |= {"entropy": last.get("train/entropy", ""), "kl_ref": last.get("train/kl_ref", "")}
    return {k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()} | {
        "seconds": round(seconds)
    }


def curves_of(run: Run, metrics: dict[str, Any]) -> Iterable[dict[str, Any]]:
    """One row an iteration."""
    names = ("rollout/reward", "train/entropy", "train/kl_ref", "rollout/completion_length")
    columns = [metrics[name][1] for name in names if name in metrics]
    for iteration, values in enumerate(zip(*columns, strict=True)):
        named = {n.split("/")[1]: round(v, 4) for n, v in zip(names, values, strict=True)}
        yield asdict(run) | {"iteration": iteration} | named


def append(file: Path, rows: list[dict[str, Any]]) -> None:
    """Add rows to a CSV file, which the first ones give its head."""
    is_new = not file.is_file()
    with file.open("a", newline="") as out:
        writer = csv.DictWriter(out, rows[0].keys(), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


def missing() -> list[Run]:
    """What of the plan has no row."""
    if not RESULTS.is_file():
        return plan()
    with RESULTS.open(newline="") as rows:
        done = {
            Run(row["method"], float(row["beta"]), row["steps"], int(row["seed"]))
            for row in csv.DictReader(rows)
        }
    return [run for run in plan() if run not in done]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--report", action="store_true", help="no runs")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    args = parser.parse_args()
    if not args.report:
        prepare()
        runs = missing()
        with ThreadPoolExecutor(args.jobs) as pool:
            futures = {pool.submit(carry_out, run, args.threads): run for run in runs}
            try:
                for count, future in enumerate(as_completed(futures), 1):
                    row, curves = future.result()
                    if curves:
                        append(CURVES, curves)
                    append(RESULTS, [row])
                    print(f"{count}/{len(runs)} {futures[future].name}: {row}", flush=True)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    report(RESULTS, CURVES, HERE)


if __name__ == "__main__":
    main()
