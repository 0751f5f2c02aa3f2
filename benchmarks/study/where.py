"""Does it matter where the process term goes? The term of FRPO moved, cut, scaled and centred.

    python benchmarks/study/where.py --pilot    # one seed at some betas, into where_pilot.csv
    python benchmarks/study/where.py            # then: runs missing from where.csv, then where.md

The problem is that of study.py, with four updates a rollout instead of one, so that the importance
ratio matters. Each variant runs at the beta at which the pilot, whose seed is not reported, ended
nearest to the distance of plain FRPO from the reference.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from compare import draw_against_drift, in_order, over_seeds, pairs, read_results, seeds_to_see
from prl_lightning.runs.text import markdown_table
from study import Run, Study, main, prepare

HERE = Path(__file__).parent
PILOT = HERE / "where_pilot.csv"
SEEDS, PILOT_SEED = range(8), 100
UPDATES, ITERATIONS = 4, 15
# What a variant sets in its reference.
TERMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "shuffled": {"shape": "shuffled"},
    "centred": {"centre": "group"},
    "per_length": {"shape": "per_length"},
    "local": {"discount": 0.0},
}
PLAIN_BETA = 0.03
# The terms without the sum over some 80 later tokens are weaker, and need a larger beta.
PILOT_BETAS = {
    "plain": (PLAIN_BETA, 0.1),
    "shuffled": (0.03, 0.1),
    "centred": (0.03, 0.1),
    "per_length": (0.03, 0.1, 1.0, 3.0),
    "local": (0.03, 0.1, 0.3, 1.0),
    "loss": (0.03, 0.1),
}
MEASURES = ["mean@16", "pass@16", "maj@16", "longer_mean@16", "entropy", "kl_ref"]


@dataclass(frozen=True)
class Placed(Run):
    """A run whose method is "none", "loss" (the KL in the loss) or one of TERMS."""

    prefix = "where-"

    def options(self) -> list[str]:
        """See ``Run.options``."""
        objective: dict[str, Any] = {"outcome": "grpo", "kl": self.method}
        if self.method == "loss":
            objective["beta"] = self.beta
        elif self.method in TERMS:
            objective["kl"] = "process"
            objective["references"] = {"base": {"beta": self.beta, **TERMS[self.method]}}
        return [
            *("--model.objective", json.dumps(objective)),
            # Of study.yaml; a named reference is tracked without it.
            *("--model.track_reference", str("references" not in objective).lower()),
            *("--data.updates_per_epoch", str(UPDATES), "--trainer.accumulate_grad_batches", "1"),
            *("--trainer.max_epochs", str(ITERATIONS)),
            *("--trainer.check_val_every_n_epoch", str(ITERATIONS)),
        ]


def pilot() -> list[Run]:
    """Every beta of every variant, on the pilot's seed."""
    return [Placed(m, beta, seed=PILOT_SEED) for m, betas in PILOT_BETAS.items() for beta in betas]


def chosen_betas(pilots: pd.DataFrame) -> dict[str, float]:
    """The beta of each variant whose ``kl_ref`` is nearest to that of plain FRPO at its own."""
    plain = pilots[(pilots.method == "plain") & (pilots.beta == PLAIN_BETA)].kl_ref.item()
    gaps = pilots.assign(gap=(pilots.kl_ref - plain).abs())
    nearest = gaps.loc[gaps.groupby("method", sort=False).gap.idxmin()]
    return dict(zip(nearest.method, nearest.beta, strict=True))


def plan(betas: dict[str, float]) -> list[Run]:
    """All runs, seed by seed."""
    return [
        Placed(method, beta, seed=seed)
        for seed in SEEDS
        for method, beta in {"none": 0.0, **betas}.items()
    ]


def table(results: pd.DataFrame) -> str:
    """Markdown: each variant, and the seeds that would see 0.03 between plain and it."""
    heads = ["variant", "beta", "seeds", *MEASURES, "seeds to see 0.03 in mean@16"]
    own = results[(results.method == "plain") & (results.beta == PLAIN_BETA)].set_index("seed")
    lines = []
    for (method, beta), rows in results.groupby(["method", "beta"], sort=False):
        less = (own["mean@16"] - rows.set_index("seed")["mean@16"]).dropna()
        can_tell = method != "plain" and len(less) > 1
        lines.append([
            *(str(method), str(beta), str(len(rows))),
            *(over_seeds(rows[m]) for m in MEASURES),
            str(seeds_to_see(less)) if can_tell else "",
        ])  # fmt: skip
    return markdown_table(heads, lines) + "\n"


def report(results: Path, curves: Path, folder: Path) -> None:
    """Write the table and the picture beside the results."""
    runs = in_order(read_results(results), ("none", *PILOT_BETAS))
    text = table(runs)
    if runs.seed.nunique() > 1:
        text += f"\n{pairs(runs, MEASURES)}"
    results.with_suffix(".md").write_text(text)
    panels = {measure: (runs, measure) for measure in ("mean@16", "pass@16")}
    draw_against_drift(panels, results.with_suffix(".png"))
    print(text)


def study_of(runs: list[Run], results: Path) -> Study:
    """Runs with their files."""
    return Study(runs, results, results.with_name(f"{results.stem}_curves.csv"), prepare)


def study_itself(pilots: Study) -> Study:
    """The runs at the betas that the pilot's chose."""
    if pilots.missing():
        sys.exit(f"{PILOT.name} has not all runs: run with --pilot first, which chooses the betas.")
    return study_of(plan(chosen_betas(read_results(PILOT))), HERE / "where.csv")


if __name__ == "__main__":
    pilots = study_of(pilot(), PILOT)
    main(lambda: study_itself(pilots), report, __doc__, pilots)
