"""The plans of where.py and real.py: each objective is one, each variant differs in one setting."""

from __future__ import annotations

import pytest
from jsonargparse import ArgumentParser

import real
import where
from prl_lightning.objective import Objective
from real import RealRun
from study import Run

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


def test_every_seed_has_every_variant_at_the_beta_of_its_pilot() -> None:
    plan = where.plan()
    assert len(set(plan)) == len(plan) == 8 * 7
    assert where.PILOT_SEED not in {run.seed for run in plan}
    assert {(run.method, run.beta) for run in plan} - {("none", 0.0)} <= {
        (run.method, run.beta) for run in where.pilot()
    }


def test_a_variant_differs_from_plain_in_its_own_setting() -> None:
    found = {run.method: objective_of(run) for run in where.plan()[:7]}
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
