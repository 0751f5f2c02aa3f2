"""The study's own arithmetic: intervals, pairing, and going on where it stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import study
from compare import difference, frpo_less, half_width, holm, interval, report, seeds_to_see
from study import Run, Study

pytestmark = pytest.mark.process


def test_intervals_by_hand() -> None:
    """1, 2, 3: standard error 1 / sqrt(3), Student's t of 2 degrees of freedom 4.303."""
    assert half_width(pd.Series([1.0, 2.0, 3.0])) == pytest.approx(4.30265 / 3**0.5)
    assert interval(0.25, 0.0314) == "0.250 ± 0.031"
    assert interval(0.25, half_width(pd.Series([0.25])), sign="+") == "+0.250"


def row(method: str, seed: int, value: float) -> dict[str, Any]:
    named = ["mean@16", "pass@16", "pass@64", "maj@16"]
    values = dict.fromkeys([*named, *(f"longer_{name}" for name in named)], value)
    return {"method": method, "beta": 0.1 * (method == "frpo"), "steps": "", "seed": seed} | {
        **values, "entropy": 0.3, "kl_ref": 0.01, "seconds": 100,
    }  # fmt: skip


def test_seeds_to_see_a_difference_by_hand() -> None:
    """Spread 0.02, t of 0.975 and of 0.8: (2.776 + 0.941) / sqrt(5) is too much, of 6 seeds not."""
    assert seeds_to_see(pd.Series([0.0, 0.02, 0.04])) == 6
    normal = ((1.960 + 0.842) * 0.1 / 0.03) ** 2  # for many seeds
    assert normal < seeds_to_see(pd.Series([0.0, 0.1, 0.2])) < normal + 3


def test_holm_by_hand() -> None:
    """The least of three is tripled, the next doubled; none is below another, or above 1."""
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.9, 0.6]) == [1.0, 1.0]


def test_differences_are_paired_by_seed() -> None:
    """A seed that GRPO has not run yet is left out; what all seeds share cancels."""
    rows = [row("grpo", 0, 0.2), row("grpo", 1, 0.6)]
    rows += [row("frpo", 0, 0.3), row("frpo", 1, 0.8), row("frpo", 2, 0.9), row("base", 0, 0.1)]
    paired = difference(pd.DataFrame(rows), "mean@16")
    assert list(paired.index) == [("frpo", 0.1, "")]
    mean, half = paired.iloc[0]
    assert mean == pytest.approx(0.15)
    assert half == pytest.approx(12.7062 * 0.05)


def test_frpo_less_another_is_paired_by_beta_and_seed() -> None:
    """At one beta +0.1, +0.3 and 0, at the other +0.2 and +0.4: of the means +0.15, +0.35."""
    values = {(0.1, 0): 0.3, (0.1, 1): 0.5, (0.2, 0): 0.4, (0.2, 1): 0.6, (0.3, 0): 0.9}
    rows = [row("frpo", seed, v) | {"beta": beta} for (beta, seed), v in values.items()]
    rows += [row("other", seed, 0.2) | {"beta": beta} for beta, seed in list(values)[:4]]
    rows += [row(name, 2, 0.2) | {"beta": 0.1} for name in ("frpo", "other")]  # at one beta alone
    first, second, both = frpo_less(pd.DataFrame(rows), "other").splitlines()
    width = 12.7062 * 0.1  # standard error of two values 0.2 apart, by Student's t
    of_three = 4.303 * 0.15275 / 3**0.5
    assert first.startswith(f"| other | 0.1 | +0.133 ± {of_three:.3f} |")
    assert second.startswith(f"| other | 0.2 | +0.300 ± {width:.3f} |")
    assert both.startswith(f"| other | all | +0.250 ± {width:.3f} |")


def test_the_plan_compares_at_every_seed() -> None:
    plan = study.plan()
    assert len(set(plan)) == len(plan)
    by_seed = [{(r.method, r.beta, r.steps) for r in plan[1:] if r.seed == s} for s in study.SEEDS]
    assert len(by_seed) == 5
    assert all(variants == by_seed[0] for variants in by_seed)
    files = {file.stem for file in (study.ROOT / "configs" / "methods").glob("*.yaml")}
    assert {run.method for run in plan} <= files | {"base"}


def test_it_goes_on_where_it_stopped_and_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [Run("base"), Run("grpo"), Run("frpo", beta=0.1), Run("frpo", beta=0.1, seed=1)]
    carried_out: list[Run] = []

    def carry_out(run: Run, threads: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        if run.seed == 1 and len(carried_out) == 3:
            carried_out.append(run)
            raise RuntimeError("killed")
        carried_out.append(run)
        curve = {"method": run.method, "beta": run.beta, "steps": run.steps, "seed": run.seed}
        curve |= {"iteration": 0, "reward": 0.5, "entropy": 0.3, "kl_ref": 0.0}
        return [row(run.method, run.seed, 0.5)], [curve | {"completion_length": 9}]

    monkeypatch.setattr(study, "carry_out", carry_out)
    monkeypatch.setattr("sys.argv", ["study.py", "--jobs", "1"])
    small = Study(runs, tmp_path / "results.csv", tmp_path / "curves.csv")
    with pytest.raises(RuntimeError, match="killed"):
        study.main(lambda: small, report, None)
    assert small.missing() == [runs[3]]
    study.main(lambda: small, report, None)
    assert carried_out == [*runs, runs[3]]
    assert small.missing() == []
    table = (tmp_path / "table.md").read_text().splitlines()
    assert len(table) == 2 + 3 + 1 + 2
    assert "| frpo | 0.1 |  | 2 | 0.500 ± 0.000 |" in table[4]
    assert {file.name for file in tmp_path.glob("*.png")} == {"betas.png", "curves-0.1.png"}
    assert capsys.readouterr().out.count("| frpo |") == 1


def test_a_failed_run_shows_its_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["python", "-c", "print('no such model'); raise SystemExit(3)"]
    monkeypatch.setattr(Run, "command", lambda self: command)
    with pytest.raises(RuntimeError, match="grpo-0.0-0 failed:\nno such model"):
        study.carry_out(Run("grpo"), threads=1)
