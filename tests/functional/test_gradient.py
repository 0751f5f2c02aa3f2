"""The surrogate's gradient is the gradient of the paper's objective, by enumerating everything.

Q(θ) = ℓ(E r) - β E Σ_t f(u_t) is computed from all completions of a tabular policy
(benchmarks/study/enumerable.py) and differentiated by autograd. The surrogate is the public API,
which does not use Q, on a group of 256 samples that holds each completion in exact proportion to
its probability.

`pytest -s` prints the relative errors.
"""

import math

import pytest
import torch
from torch import Tensor

from enumerable import BETA, CUSTOM, GENERATORS, GROUP, UTILITIES, World, make_world
from prl_lightning.functional import (
    kl_in_reward_step,
    kl_in_reward_trajectory,
    outcome_advantages,
    prl_advantages,
    process_term,
)


@pytest.fixture(autouse=True)
def _print_the_test(request: pytest.FixtureRequest) -> None:
    print(f"\n{request.node.name:<80}", end="")


def relative_error(got: Tensor, want: Tensor) -> float:
    error = ((got - want).norm() / want.norm()).item()
    print(f"{error:9.1e}", end="")
    return error


def surrogate_error(world: World, advantages: Tensor, divergence: str, utility: str) -> float:
    want = world.gradient(world.objective(divergence, utility))
    return relative_error(world.surrogate_gradient(advantages), want)


def test_world_is_complete() -> None:
    world = make_world("binary")
    assert len(world.rewards) == 1 + 2 + 4 + 24
    assert world.mask.sum(-1).unique().tolist() == [1, 2, 3, 4]
    assert world.probabilities.sum().item() == pytest.approx(1, abs=1e-12)
    counts = world.probabilities * GROUP
    torch.testing.assert_close(counts, counts.round(), rtol=0, atol=1e-9)
    assert 0.2 < (world.probabilities * world.rewards).sum() < 0.8


@pytest.mark.parametrize("divergence", GENERATORS)
@pytest.mark.parametrize(
    ("kind", "utility"),
    [("grpo", "arcsin"), ("dr_grpo", "linear"), ("reward", "linear"), ("maxrl", "log")],
)
def test_gradient_is_the_papers(divergence: str, kind: str, utility: str) -> None:
    world = make_world("real" if utility == "linear" else "binary")
    rewards, log_ratios, mask = world.in_group()
    outcome = outcome_advantages(rewards, GROUP, kind)
    advantages = prl_advantages(outcome, log_ratios, mask, BETA, CUSTOM.get(divergence, divergence))
    assert surrogate_error(world, advantages, divergence, utility) < 1e-9


def test_grpo_is_the_arcsin_advantage() -> None:
    """A = (r - p)/√(p(1 - p)) = ℓ'(p)·(r - p) with ℓ = 2·arcsin√: Proposition 3.1."""
    rewards = torch.tensor([1.0] * 3 + [0.0] * 5, dtype=torch.float64)
    p = torch.tensor(3 / 8, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(UTILITIES["arcsin"](p), p)
    got = outcome_advantages(rewards, group_size=8, kind="grpo")
    torch.testing.assert_close(got, slope * (rewards - 3 / 8), rtol=1e-14, atol=0)
    assert got[0].item() == pytest.approx(math.sqrt(5 / 3), rel=1e-14)


def test_kl_in_reward_has_the_gradient_when_linear() -> None:
    """Σ_{j<t} δ_j does not depend on a_t, so without group statistics it is only noise.

    Nor does a mean over the completions that reach t: a baseline.
    """
    world = make_world()
    args, mask = (*world.in_group(), BETA), world.group(world.mask)
    for advantages in (
        outcome_advantages(kl_in_reward_trajectory(*args), 1, "reward"),
        outcome_advantages(kl_in_reward_step(*args), GROUP, "dr_grpo", mask),
    ):
        assert surrogate_error(world, advantages, "reverse_kl", "linear") < 1e-9


def test_kl_in_reward_is_not_the_arcsin_gradient() -> None:
    """Group statistics of the shaped reward change the objective: PRL decouples them."""
    world = make_world("binary")
    args, mask = (*world.in_group(), BETA), world.group(world.mask)
    for advantages in (
        outcome_advantages(kl_in_reward_trajectory(*args), GROUP, "grpo"),
        outcome_advantages(kl_in_reward_step(*args), GROUP, "grpo", mask),
    ):
        assert surrogate_error(world, advantages, "reverse_kl", "arcsin") > 1e-2


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "k3+"])
@pytest.mark.parametrize("divergence", ["reverse_kl", "reverse_k3", "forward_kl", "forward_k3"])
def test_kl_loss_is_not_the_gradient(estimator: str, divergence: str) -> None:
    """Of the regulariser alone, so that a large outcome gradient cannot hide the difference."""
    world = make_world()
    want = world.gradient(world.regulariser(divergence))
    assert relative_error(world.kl_loss_gradient(estimator), want) > 1e-2


@pytest.mark.parametrize("estimator", ["k2", "k3+"])
def test_kl_loss_lacks_exactly_the_future(estimator: str) -> None:
    """∇ KL = E Σ_t (δ_t + Σ_{j>t} δ_j) ∇ log π_t; the loss has δ_t, the process term has both."""
    world = make_world()
    _, log_ratios, mask = world.in_group()
    future = process_term(log_ratios, mask) - log_ratios
    got = world.kl_loss_gradient(estimator) + world.surrogate_gradient(future)
    assert relative_error(got, world.gradient(world.regulariser("reverse_kl"))) < 1e-9


def test_kl_loss_k1_has_no_gradient() -> None:
    assert make_world().kl_loss_gradient("k1").abs().max() < 1e-12


def test_kl_loss_k2_is_the_gradient_of_single_tokens() -> None:
    """The control: without a future there is nothing to lack, and the same code agrees."""
    world = make_world(max_length=1)
    want = world.gradient(world.regulariser("reverse_kl"))
    assert relative_error(world.kl_loss_gradient("k2"), want) < 1e-9
