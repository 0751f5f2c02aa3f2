"""The general form: discounts, several references, the uniform one; against autograd and loops.

`pytest -s` prints the relative errors.
"""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from enumerable import BETA, CUSTOM, GENERATORS, GROUP, VOCABULARY, World, make_world
from prl_lightning.functional import outcome_advantages, prl_advantages, process_term
from prl_lightning.references import Reference, process_terms

from .test_gradient import _print_the_test, relative_error  # noqa: F401


def discounted(world: World, divergence: str, discount: float) -> Tensor:
    """E Σ_t ∇ log π_t (Σ_{j≥t} γ^{j-t} f(u_j) - f'(u_t) u_t) by plain loops and finite sums."""
    f, deltas = GENERATORS[divergence], world.log_ratios.detach()
    reg = torch.zeros_like(deltas)
    for i, row in enumerate(world.mask):
        places = row.nonzero().flatten().tolist()
        for t in places:
            u = (-deltas[i, t]).exp().requires_grad_()
            (slope,) = torch.autograd.grad(f(u), u)
            reg[i, t] = (
                f(u.detach())
                - slope * u.detach()
                + sum(discount ** (j - t) * f((-deltas[i, j]).exp()) for j in places if j > t)
            )
    weighted = world.probabilities.detach()[:, None] * reg * world.logprobs(world.table)
    return world.gradient(weighted.sum())


@pytest.mark.parametrize("discount", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("divergence", GENERATORS)
def test_a_discount_is_exact_at_1_and_biased_below(divergence: str, discount: float) -> None:
    """The constants that are dropped from the term have no gradient: E Σ_t ∇ log π_t c = 0."""
    world = make_world()
    _, log_ratios, mask = world.in_group()
    generator = CUSTOM.get(divergence, divergence)
    term = process_term(log_ratios, mask, generator, discount=discount)
    got, exact = world.surrogate_gradient(term), world.gradient(world.regulariser(divergence))
    assert relative_error(got, discounted(world, divergence, discount)) < 1e-12
    bias = relative_error(got, exact)
    assert bias < 1e-12 if discount == 1 else bias > 1e-3


def test_a_discount_of_0_is_the_kl_in_the_loss() -> None:
    """On-policy distillation with a reverse KL per token is k2 in the loss."""
    world = make_world()
    _, log_ratios, mask = world.in_group()
    got = world.surrogate_gradient(process_term(log_ratios, mask, discount=0.0))
    assert relative_error(got, world.kl_loss_gradient("k2")) < 1e-12


def two_references(world: World) -> tuple[list[Reference], Tensor, Tensor]:
    """Two references, their log-ratios (B, T, 2), and autograd's gradient."""
    generator = torch.Generator().manual_seed(21)
    other = replace(
        world, ref_table=torch.randn(world.table.shape, generator=generator, dtype=torch.float64)
    )
    references = [Reference(beta=0.3), Reference(beta=0.7, divergence="reverse_k3")]
    expected_reward = (world.probabilities * world.rewards).sum()
    cost = 0.3 * world.regulariser("reverse_kl") + 0.7 * other.regulariser("reverse_k3")
    log_ratios = torch.stack([world.log_ratios, other.log_ratios], -1)
    return references, log_ratios, world.gradient(expected_reward - cost)


def test_two_references_at_once() -> None:
    world = make_world()
    references, log_ratios, want = two_references(world)
    mask = world.group(world.mask)
    outcome = outcome_advantages(world.group(world.rewards), GROUP, "dr_grpo")
    terms = process_terms(references, world.group(log_ratios), mask)
    got = world.surrogate_gradient(outcome[:, None] - terms)
    assert relative_error(got, want) < 1e-12


def test_a_uniform_reference_is_an_entropy_bonus_with_a_price_for_length() -> None:
    """-KL to the uniform distribution is the entropy minus log V for each token."""
    world = make_world()
    uniform = replace(world, ref_table=torch.zeros_like(world.ref_table))
    rewards, log_ratios, mask = uniform.in_group()
    terms = BETA * process_term(log_ratios, mask)
    got = world.surrogate_gradient(outcome_advantages(rewards, GROUP, "reward")[:, None] - terms)
    logprobs = world.logprobs(world.table)
    expected_reward = (world.probabilities * world.rewards).sum()
    entropy = -(world.probabilities * logprobs.sum(-1)).sum()
    length = (world.probabilities * world.mask.sum(-1)).sum()
    want = world.gradient(expected_reward + BETA * (entropy - math.log(VOCABULARY) * length))
    assert relative_error(got, want) < 1e-12


def returns_of_openrlhf(
    outcome: float, delta: list[float], beta: float, gamma: float
) -> list[float]:
    """Returns of token rewards -β·δ_j, the outcome on the last token (`group_norm`)."""
    rewards = [-beta * d for d in delta]
    rewards[-1] += outcome
    returns, later = [0.0] * len(delta), 0.0
    for t in reversed(range(len(delta))):
        later = rewards[t] + gamma * later
        returns[t] = later
    return returns


def advantages_of_tinker(
    outcome: list[float], deltas: list[list[float]], beta: float, gamma: float
) -> list[list[float]]:
    """A_i plus the discounted later sums of β·(mean δ - δ_j), the mean over the batch's tokens."""
    mean = sum(map(sum, deltas)) / sum(map(len, deltas))
    return [
        [
            a + sum(gamma ** (j - t) * beta * (mean - row[j]) for j in range(t, len(row)))
            for t in range(len(row))
        ]
        for a, row in zip(outcome, deltas, strict=True)
    ]


def test_openrlhf_and_tinker_give_the_same_on_the_same_numbers() -> None:
    world = make_world("binary")
    rewards, log_ratios, mask = (x.detach() for x in world.in_group())
    outcome = (rewards - rewards.mean()) / rewards.std(correction=0)
    lengths = mask.sum(-1).tolist()
    deltas = [row[:n] for row, n in zip(log_ratios.tolist(), lengths, strict=True)]

    def padded(rows: list[list[float]]) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(r, dtype=torch.float64) for r in rows], True
        )

    ours = prl_advantages(outcome, log_ratios, mask, BETA)
    theirs = [
        returns_of_openrlhf(a, row, BETA, 1.0)
        for a, row in zip(outcome.tolist(), deltas, strict=True)
    ]
    gap = (padded(theirs) - ours).abs().max().item()
    print(f" OpenRLHF {gap:.1e}", end="")
    assert gap < 1e-12
    for gamma in (0.0, 0.9, 1.0):
        term = process_term(log_ratios, mask, discount=gamma)
        ours = (outcome[:, None] - BETA * term) * mask
        # Their baseline: the batch's mean δ, discounted in the same way.
        tokens = mask.double()
        mean = (log_ratios * tokens).sum() / tokens.sum()
        baseline = process_term(tokens, mask, discount=gamma) * mean * BETA
        theirs = advantages_of_tinker(outcome.tolist(), deltas, BETA, gamma)
        gap = (padded(theirs) - ours - baseline * tokens).abs().max().item()
        print(f" tinker γ={gamma:g} {gap:.1e}", end="")
        assert gap < 1e-12
