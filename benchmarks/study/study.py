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
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from compare import report
from prl_lightning.arithmetic import ArithmeticTask, draw_problems
from prl_lightning.arithmetic.prepare import write_rows
from prl_lightning.runs.files import read_metrics

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RUNS = Path("runs/study")
NAMED = ("method", "beta", "steps", "seed")  # columns that name a run

SEEDS = range(5)
MORE_SEEDS = range(5, 15)  # of GRPO, and of those with a sweep at their best beta
SWEEP = (0.01, 0.03, 0.1, 0.3)  # of beta, where a method has its best
BEST = 0.03  # of the sweep, by the first five seeds
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

    config: ClassVar[Path] = HERE / "study.yaml"
    prefix: ClassVar[str] = ""  # of the folder's name

    @property
    def name(self) -> str:
        return self.prefix + "-".join(str(value) for value in asdict(self).values() if value != "")

    def command(self) -> list[str]:
        """The command line, as a user has it."""
        word = "validate" if self.method == "base" else "fit"
        return [
            *(sys.executable, "-m", "prl_lightning", word, "--config", str(self.config)),
            *self.options(),
            *("--seed_everything", str(self.seed), "--data.seed", str(self.seed)),
            *("--trainer.default_root_dir", str(RUNS / self.name)),
        ]

    def files(self) -> tuple[str, ...]:
        """The files of configs/methods that are laid over each other."""
        return () if self.method == "base" else (self.method,)

    def options(self) -> list[str]:
        """What the command lays over the configuration."""
        options = method_files(*self.files())
        if self.beta:
            options += ["--model.objective.beta", str(self.beta)]
        if self.steps:
            options += ["--model.objective.steps", self.steps]
        return options

    def rows(self, metrics: dict[str, Any]) -> list[dict[str, Any]]:
        """What is kept of the run's metrics.

        The mean over 64 samples stands for mean@16, whose value it is.
        """
        last = last_values(metrics)
        row: dict[str, Any] = asdict(self)
        for prefix, where in (("", "same"), ("longer_", "longer")):
            row |= {f"{prefix}mean@16": last[f"val/{where}/mean@{SAMPLES}"]}
            names = ("pass@16", "pass@64", "maj@16")
            row |= {f"{prefix}{name}": last[f"val/{where}/{name}"] for name in names}
        return [row | of_training(last)]


def last_values(metrics: dict[str, Any]) -> dict[str, float]:
    """What a run logged last."""
    return {name: values[-1] for name, (_, values) in metrics.items()}


def of_training(last: dict[str, float]) -> dict[str, Any]:
    """Entropy and drift, "" where nothing was trained or measured."""
    return {name: last.get(f"train/{name}", "") for name in ("entropy", "kl_ref")}


def method_files(*methods: str) -> list[str]:
    """Options for files of configs/methods, laid over each other."""
    return [word for m in methods for word in ("--config", f"{ROOT}/configs/methods/{m}.yaml")]


def plan() -> list[Run]:
    """All runs, seed by seed: what is there at any time can be compared."""
    variants: list[dict[str, Any]] = [{"method": "grpo"}, {"method": "raft"}]
    for beta in SWEEP:
        variants += [{"method": name, "beta": beta} for name in ("frpo", "grpo-kl-loss")]
    others = ("frpo-k3", "grpo-kl-reward-trajectory", "grpo-kl-reward-step")
    variants += [{"method": name, "beta": BETA} for name in others]
    variants += [{"method": "prl", "beta": BETA, "steps": size} for size in ("4", "16", "64")]
    variants += [{"method": "prl-newline", "beta": BETA, "steps": "newline"}]
    headline = [Run("grpo"), Run("frpo", BEST), Run("grpo-kl-loss", BEST)]
    return [
        Run("base"),
        *(Run(**variant, seed=seed) for seed in SEEDS for variant in variants),
        Run("base", seed=MORE_SEEDS.start),  # made again, on another machine
        *(replace(run, seed=seed) for seed in MORE_SEEDS for run in headline),
    ]


def prepare() -> None:
    """Make the problems and the base model, once."""
    TASK()
    longer = RUNS / "longer.jsonl"
    if not longer.is_file():
        write_rows(longer, islice(draw_problems(**LONGER), LONGER_PROBLEMS))


def carry_out(run: Run, threads: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """One run in a process of its own.

    Returns:
        Its rows of the results, and those of the curves.

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
    rows = [rounded(row) | {"seconds": round(seconds)} for row in run.rows(metrics)]
    return rows, list(curves_of(run, metrics))


def rounded(row: dict[str, Any]) -> dict[str, Any]:
    """Figures of five digits."""
    return {k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()}


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


def named_rows(file: Path, columns: Sequence[str]) -> set[tuple[str, ...]]:
    """What some columns of a CSV file have; nothing if there is no file."""
    if not file.is_file():
        return set()
    with file.open(newline="") as rows:
        return {tuple(row[key] for key in columns) for row in csv.DictReader(rows)}


@dataclass(frozen=True)
class Study:
    """Runs, and the files that keep what came out of them.

    Attributes:
        plan: all runs, in the order in which they start.
        results: CSV with a row for each finished run.
        curves: CSV with a row for each of its iterations.
        prepare: makes what the runs share, once.
    """

    plan: Sequence[Run]
    results: Path
    curves: Path
    prepare: Callable[[], None] = lambda: None

    def missing(self) -> list[Run]:
        """What of the plan has no row."""
        done = named_rows(self.results, NAMED)
        return [run for run in self.plan if tuple(map(str, asdict(run).values())) not in done]

    def carry_out(self, jobs: int, threads: int) -> None:
        """Run what is missing, several at a time."""
        self.prepare()
        runs = self.missing()
        with ThreadPoolExecutor(jobs) as pool:
            futures = {pool.submit(carry_out, run, threads): run for run in runs}
            try:
                for count, future in enumerate(as_completed(futures), 1):
                    rows, curves = future.result()
                    if curves:
                        append(self.curves, curves)
                    append(self.results, rows)
                    print(f"{count}/{len(runs)} {futures[future].name}: {rows}", flush=True)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def main(
    study: Callable[[], Study],
    report: Callable[[Path, Path, Path], None],
    about: str | None,
    pilot: Study | None = None,
) -> None:
    """The command line of a study.

    Args:
        study: makes what it runs.
        report: writes from results and curves into a folder.
        about: its help.
        pilot: runs whose results the study needs.
    """
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--report", action="store_true", help="no runs")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    if pilot is not None:
        parser.add_argument("--pilot", action="store_true", help="runs that the others need")
    args = parser.parse_args()
    asked = pilot if pilot is not None and args.pilot else study()
    if not args.report:
        asked.carry_out(args.jobs, args.threads)
    report(asked.results, asked.curves, asked.results.parent)


if __name__ == "__main__":
    files = HERE / "results.csv", HERE / "curves.csv"
    main(lambda: Study(plan(), *files, prepare), report, __doc__)
