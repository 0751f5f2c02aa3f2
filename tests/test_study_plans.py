"""The plans of where.py and real.py: each objective is one, each variant differs in one setting."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from jsonargparse import ArgumentParser

import real
import study
import where
from prl_lightning.objective import Objective
from real import RealRun
from study import Run, Study

pytestmark = pytest.mark.process


def objective_of(run: Run) -> Objective:
    """As the command line reads it."""
    command = run.command()
    parser = ArgumentParser()
    parser.add_argument("--objective", type=Objective)
    value = command[command.index("--model.objective") + 1]
    parsed = parser.parse_args(["--objective", value])
    objective: Objective = parser.instantiate_classes(parsed).objective
    objective.check_names()
    return objective


BETAS = dict.fromkeys((*where.TERMS, "loss"), 0.1)


def test_each_variant_runs_at_the_beta_nearest_to_plain_in_the_pilot() -> None:
    """Plain ends at 0.04, of the others local is nearest at 0.1 and the loss at 0.3."""
    far = {
        ("plain", 0.03): 0.04, ("local", 0.03): 0.06, ("local", 0.1): 0.041, ("local", 0.3): 0.03,
        ("loss", 0.1): 0.07, ("loss", 0.3): 0.05,
    }  # fmt: skip
    rows = [{"method": m, "beta": beta, "kl_ref": kl} for (m, beta), kl in far.items()]
    betas = where.chosen_betas(pd.DataFrame(rows))
    assert betas == {"plain": 0.03, "local": 0.1, "loss": 0.3}
    plan = where.plan(betas)
    assert len(set(plan)) == len(plan) == 8 * 4
    assert where.PILOT_SEED not in {run.seed for run in plan}
    assert {run.seed for run in where.pilot()} == {where.PILOT_SEED}
    assert {run.method for run in where.pilot()} == {*where.TERMS, "loss"}


def test_a_variant_differs_from_plain_in_its_own_setting() -> None:
    found = {run.method: objective_of(run) for run in where.plan(BETAS)[:7]}
    assert found["none"].kl == "none"
    assert found["loss"].kl == "loss"
    terms = {name: found[name].references["base"] for name in where.TERMS}
    plain = terms["plain"]
    assert (plain.shape, plain.discount, plain.centre) == ("plain", 1.0, "none")
    assert terms["shuffled"].shape == "shuffled"
    assert terms["per_length"].shape == "per_length"
    assert terms["centred"].centre == "group"
    assert terms["local"].discount == 0.0


def test_real_rows_are_one_for_each_task_and_level() -> None:
    values = {
        f"val/{task}{level}/{measure}": (None, [0.1, 0.5])
        for task in real.TASKS
        for level in ("", "-harder")
        for measure in real.MEASURES
    }
    rows = RealRun("frpo", seed=2).rows(values | {"train/entropy": (None, [0.3])})
    assert len(rows) == 6
    assert {(row["task"], row["level"]) for row in rows} == {
        (task, level) for task in real.TASKS for level in ("same", "harder")
    }
    assert all(row["mean@8"] == 0.5 and row["seed"] == 2 for row in rows)
    assert rows[0]["entropy"] == 0.3
    assert rows[0]["kl_ref"] == ""


def test_a_run_lays_the_methods_files_over_the_real_models() -> None:
    command = " ".join(RealRun("frpo-maxrl", seed=1).command())
    first, second = command.index("frpo.yaml"), command.index("maxrl.yaml")
    assert first < second < command.index("--model.objective.kl process")
    assert command.count("real.yaml") == 1
    assert len(real.plan()) == 1 + 4 * 5


def test_the_real_models_report_compares_within_seeds_and_over_tasks(tmp_path: Path) -> None:
    """FRPO is 0.1 above GRPO in each seed, and at 0.2 and 0.4 in products, at 0.5 in the others."""
    rows = [
        {"method": method, "beta": 0.0, "steps": "", "seed": seed, "task": task, "level": level}
        | dict.fromkeys(real.MEASURES, of_task + 0.1 * (method == "frpo"))
        | {"entropy": 0.3, "kl_ref": 0.01 * (seed + 1), "seconds": 1}
        for method in ("grpo", "frpo")
        for seed, products in enumerate((0.1, 0.3))
        for task, of_task in {"products": products, "chain_sum": 0.4, "gcd": 0.4}.items()
        for level in ("same", "harder")
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "real.csv", index=False)
    real.report(tmp_path / "real.csv", tmp_path / "curves.csv", tmp_path)
    text = (tmp_path / "real.md").read_text()
    # 0.4 and 0.467 over the tasks; t of one degree of freedom is 12.706, sd/sqrt(2) 0.0333.
    assert "| same | all | frpo | 2 | 0.433 ± 0.424 |" in text
    assert text.count("+0.100 ± 0.000") == 2 * 4 * 3
    assert "| harder | products | frpo | 2 | 0.300 ± 1.271 |" in text
    assert "| frpo | same | 2 | 2 | 2 | 2 |" in text  # without a spread, two seeds are enough
    assert (tmp_path / "real.png").stat().st_size > 10_000


def test_the_report_of_the_places_subtracts_in_each_seed(tmp_path: Path) -> None:
    """Local is 0.06 and 0.02 above plain, and ended first: 0.04, t 12.706, sd/sqrt(2) 0.02."""
    rows = [
        {"method": method, "beta": beta, "steps": "", "seed": seed}
        | dict.fromkeys(where.MEASURES, value)
        for method, beta, values in (("local", 0.1, (0.36, 0.42)), ("plain", 0.03, (0.3, 0.4)))
        for seed, value in enumerate(values)
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "where.csv", index=False)
    where.report(tmp_path / "where.csv", tmp_path / "curves.csv", tmp_path)
    plain, local, *_, less = (tmp_path / "where.md").read_text().splitlines()[2:]
    assert plain.startswith("| plain | 0.03 | 2 | 0.350 ± 0.635 |")
    assert local.startswith("| local | 0.1 | 2 | 0.390 ± 0.381 |")
    assert local.endswith("| 10 |")  # sd 0.0283: (2.262 + 0.883) * sd / sqrt(10), not of 9 seeds
    # The p of one pair: 1 - 2 atan(2) / pi, of one degree of freedom.
    assert less.startswith("| plain - local | -0.040 ± 0.254, p 0.30 |")
    assert less.count("-0.040 ± 0.254") == len(where.MEASURES)
    assert (tmp_path / "where.png").stat().st_size > 10_000


def test_the_pilot_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Study] = []
    monkeypatch.setattr(Study, "carry_out", lambda self, jobs, threads: asked.append(self))
    pilots = Study([], tmp_path / "pilot.csv", tmp_path / "curves.csv")
    itself = Study([], tmp_path / "itself.csv", tmp_path / "curves.csv")
    for words in (["--pilot"], []):
        monkeypatch.setattr("sys.argv", ["where.py", *words])
        study.main(lambda: itself, lambda *files: None, None, pilots)
    assert asked == [pilots, itself]
    unfinished = where.study_of(where.pilot(), tmp_path / "none.csv")
    with pytest.raises(SystemExit, match="--pilot first"):
        where.study_itself(unfinished)
