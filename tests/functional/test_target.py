"""A target for the KL: the rule that beta follows, and where the steered beta acts.

`test_references.py` above has whole runs, `test_resume.py` those that are interrupted.
"""

from __future__ import annotations

from dataclasses import replace
from math import inf, nan

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from enumerable import make_world
from prl_lightning.objective import Objective
from prl_lightning.references import MeanKL, Reference

from .batches import Batch, batches, quick

KINDS = [
    Objective(target=0.1),
    Objective(target=0.1, kl="loss"),
    Objective(target=0.1, kl="reward_trajectory"),
    Objective(target=0.1, kl="reward_step"),
    Objective(target=0.1, baseline=True, divergence="reverse_k3"),
    Objective(references={"fixed": Reference(), "start": Reference(target=0.1, centre="group")}),
]


def test_the_rule_of_ppo_by_hand() -> None:
    """Doubled above 0.15, halved below 0.0667, kept between them, and within the bounds."""
    kls = [0.0, 0.07, 0.149, 0.151, 9.0, 0.1, nan, 0.06, -1.0, 0.0, 0.0, inf]
    want = [0.02, 0.02, 0.02, 0.04, 0.05, 0.05, 0.05, 0.025, 0.0125, 0.01, 0.01, 0.02]
    reference = Reference(beta=0.04, target=0.1, min_beta=0.01, max_beta=0.05)
    got = [(reference := reference.steered(kl)).beta for kl in kls]
    assert got == want


def test_without_a_target_beta_stays() -> None:
    assert Reference(beta=5.0).steered(100.0).beta == 5.0
    assert Objective(kl="loss").with_betas({"reference": 1.0}) == Objective(kl="loss")


@pytest.mark.parametrize("objective", KINDS, ids=lambda one: f"{one.kl}-{len(one.references)}")
def test_the_beta_acts_where_the_kl_is(objective: Objective) -> None:
    """As if it had been configured: in each of the values that an objective has of beta."""
    count = len(objective.named_references)
    steered = objective.steered([0.2] * count)
    if objective.references:
        doubled = {
            **objective.references,
            "start": replace(objective.references["start"], beta=0.02),
        }
        assert steered == replace(objective, references=doubled)
        assert steered.steered_betas == {"start": 0.02}
    else:
        assert steered == replace(objective, beta=0.02)
        assert steered.steered_betas == {"reference": 0.02}
    assert objective.with_betas(steered.steered_betas) == steered


@pytest.mark.parametrize("beta", [0.001, 1.0])
def test_the_kl_comes_to_its_target_from_either_side(beta: float) -> None:
    """Exact ascent on E r - β·KL of an enumerated policy that starts at the reference."""
    world, target = make_world("binary"), 0.05
    world = replace(world, table=world.ref_table.clone().requires_grad_())
    objective, kls, betas = Objective(beta=beta, target=target), [], []
    for _ in range(120):
        kl = world.regulariser("reverse_kl")
        with torch.no_grad():
            kls.append((kl / (world.probabilities @ world.mask.sum(-1).double())).item())
            betas.append(objective.beta)
        step = world.gradient(world.success - objective.beta * kl)
        world = replace(world, table=(world.table + step).detach().requires_grad_())
        objective = objective.steered([kls[-1]])
    assert kls[0] == 0
    assert betas[1] == max(beta / 2, 0.001)
    assert all(target / 2 < kl < 2 * target for kl in kls[-40:]), kls
    assert 0.001 < betas[-1] < 1


@quick
@given(batch=batches(), cuts=st.lists(st.integers(0, 12), max_size=3), other=st.integers(1, 99))
def test_the_mean_kl_is_a_loop_over_tokens(batch: Batch, cuts: list[int], other: int) -> None:
    """Of finished updates alone, however they are cut into micro-batches."""
    log_ratios = torch.stack([batch.log_ratios, batch.noise(other)], -1)
    kls, bounds = MeanKL(), sorted({0, len(batch.mask), *(c for c in cuts if c < len(batch.mask))})
    for start, end in zip(bounds, bounds[1:], strict=False):
        kls.add(log_ratios[start:end], batch.mask[start:end])
        kls.end_update()
    kls.totals = kls.totals or [0.0, 0.0, 0.0]
    finished = list(kls.totals)
    kls.add(torch.ones(1, 1, 2), torch.ones(1, 1))
    assert kls.totals == finished
    for column, got in enumerate(kls.end_iteration()):
        tokens = [
            log_ratios[i, t, column].item() for i, row in enumerate(batch.rows()) for t in row
        ]
        want = sum(tokens) / len(tokens) if tokens else nan
        assert got == pytest.approx(want, abs=1e-12, nan_ok=True)
    assert kls.totals == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": 0.0}, r"target=0\.0: "),
        ({"target": -0.1}, r"target=-0\.1: "),
        ({"target": nan}, "target=nan: "),
        ({"target": 0.1, "beta": 0.0}, r"target=0\.1 with beta=0\.0, min_beta=0\.001"),
        ({"target": 0.1, "min_beta": 0.5, "max_beta": 0.1}, r"min_beta=0\.5, max_beta=0\.1"),
        ({"target": 0.1, "min_beta": 0.0}, r"min_beta=0\.0"),
        ({"target": 0.1, "max_beta": inf}, "max_beta=inf"),
        ({"target": 0.1, "beta": 2.0}, r"beta=2\.0, .*max_beta=1\.0"),
        ({"max_beta": 2.0}, r"target=None .*max_beta=2\.0"),
    ],
)
def test_a_target_that_cannot_work_is_named(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=rf"references\.a\..*{message}"):
        Objective(references={"a": Reference(**settings)})  # type: ignore[arg-type]
    if settings.keys() <= {"beta", "target"}:
        with pytest.raises(ValueError, match=rf"objective\..*{message}"):
            Objective(**settings)  # type: ignore[arg-type]


def test_a_target_without_a_kl_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"target=0\.1 .*kl='none'"):
        Objective(kl="none", target=0.1)
    with pytest.raises(ValueError, match=r"references=\['a'\].*'target'"):
        Objective(references={"a": Reference()}, target=0.1)
