"""The surrogate's gradient is the gradient of the paper's objective, by enumerating everything.

A tabular autoregressive policy over three tokens, one of them EOS, of at most four tokens: 31
completions of length 1 to 4. Q(θ) = ℓ(E r) - β E Σ_t f(u_t) is computed from all of them and
differentiated by autograd. The surrogate is the public API, which does not use Q, on a group of 256
samples that holds each completion in exact proportion to its probability.

`pytest -s` prints the relative errors.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from prl_lightning.functional import (
    Aggregation,
    Divergence,
    kl_in_reward_step,
    kl_in_reward_trajectory,
    kl_loss,
    outcome_advantages,
    policy_loss,
    prl_advantages,
    process_term,
)
from prl_lightning.objective import Objective
from prl_lightning.references import Reference

VOCABULARY, EOS, GROUP, BETA = 3, 0, 256, 0.3
SUM = Aggregation("constant", num_sequences=GROUP, max_length=1)

GENERATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "reverse_kl": lambda u: -u.log(),
    "reverse_k3": lambda u: -u.log() + u - 1,
    "forward_kl": lambda u: u.log(),
    "forward_k3": lambda u: u * u.log() - u + 1,
    "chi_square": lambda u: (u - 1) ** 2,
    "jensen_shannon": lambda u: u * u.log() - (u + 1) * ((u + 1) / 2).log(),
}
CUSTOM = {
    "chi_square": Divergence.from_generator(GENERATORS["chi_square"], lambda u: 2 * (u - 1)),
    "jensen_shannon": Divergence.from_generator(
        GENERATORS["jensen_shannon"], lambda u: (2 * u / (u + 1)).log()
    ),
}
UTILITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda p: p,
    "arcsin": lambda p: 2 * p.sqrt().arcsin(),
    "log": lambda p: p.log(),
}


@dataclass(frozen=True)
class World:
    """Every completion of a tabular policy, with its probability and its reward."""

    table: Tensor
    """Policy logits, (states, V), with gradient."""
    ref_table: Tensor
    rewards: Tensor
    """(B,)"""
    states: Tensor
    """(B, T): the row of the table each token is drawn from."""
    ids: Tensor
    mask: Tensor

    def logprobs(self, table: Tensor) -> Tensor:
        chosen = table.log_softmax(-1)[self.states, self.ids]
        return torch.where(self.mask, chosen, 0.0)

    @property
    def log_ratios(self) -> Tensor:
        return self.logprobs(self.table) - self.logprobs(self.ref_table)

    @property
    def probabilities(self) -> Tensor:
        return self.logprobs(self.table).sum(-1).exp()

    @property
    def success(self) -> Tensor:
        """E r."""
        return (self.probabilities * self.rewards).sum()

    def regulariser(self, divergence: str) -> Tensor:
        """E Σ_t f(u_t)."""
        f = GENERATORS[divergence]
        costs = torch.where(self.mask, f((-self.log_ratios).exp()), 0.0).sum(-1)
        return (self.probabilities * costs).sum()

    def objective(self, divergence: str, utility: str) -> Tensor:
        return UTILITIES[utility](self.success) - BETA * self.regulariser(divergence)

    def gradient(self, value: Tensor) -> Tensor:
        return torch.autograd.grad(value, self.table)[0]

    def group(self, values: Tensor) -> Tensor:
        """The values of 256 samples, from the values of all completions."""
        return values.repeat_interleave((self.probabilities * GROUP).round().long(), 0)

    def in_group(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rewards, log-ratios and mask of the group."""
        return self.group(self.rewards), self.group(self.log_ratios), self.group(self.mask)

    def surrogate_gradient(self, advantages: Tensor) -> Tensor:
        """Minus the gradient of the loss of the group."""
        policy = self.group(self.logprobs(self.table))
        loss, stats = policy_loss(
            policy, policy.detach(), advantages, self.group(self.mask), aggregation=SUM
        )
        assert stats["ratio_max"] == 1  # on-policy
        return -self.gradient(loss)

    def kl_loss_gradient(self, estimator: str) -> Tensor:
        policy, ref = (self.group(self.logprobs(table)) for table in (self.table, self.ref_table))
        return self.gradient(
            kl_loss(policy, ref, self.group(self.mask), estimator, aggregation=SUM)
        )


def completions(max_length: int) -> list[tuple[int, ...]]:
    """All sequences that end at the first EOS or at the limit."""
    return [
        ids
        for length in range(1, max_length + 1)
        for ids in itertools.product(range(VOCABULARY), repeat=length)
        if EOS not in ids[:-1] and (ids[-1] == EOS or length == max_length)
    ]


def make_world(rewards: str = "real", max_length: int = 4) -> World:
    generator = torch.Generator().manual_seed(20)
    sequences = completions(max_length)
    prefixes = sorted({ids[:t] for ids in sequences for t in range(len(ids))})
    shape = (len(sequences), max_length)
    states, ids = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    mask = torch.zeros(shape, dtype=torch.bool)
    for i, sequence in enumerate(sequences):
        for t, token in enumerate(sequence):
            states[i, t], ids[i, t], mask[i, t] = prefixes.index(sequence[:t]), token, True
    # Each state's probabilities are 1/2, 1/4 and 1/4 in some order; a completion's are n/256.
    orders = sorted({*itertools.permutations((0.5, 0.25, 0.25))})
    table = torch.tensor([orders[state % 3] for state in range(len(prefixes))]).double().log()
    ref_table, values = (
        torch.randn(size, generator=generator, dtype=torch.float64)
        for size in (table.shape, len(sequences))
    )
    rewarded = (values > 0).double() if rewards == "binary" else values
    return World(table.requires_grad_(), ref_table, rewarded, states, ids, mask)


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


def two_references(world: World) -> tuple[Objective, Tensor, Tensor]:
    """An objective of two references, its log-ratios (B, T, 2), and autograd's gradient."""
    generator = torch.Generator().manual_seed(21)
    other = replace(
        world, ref_table=torch.randn(world.table.shape, generator=generator, dtype=torch.float64)
    )
    objective = Objective(
        outcome="dr_grpo",
        references={
            "start": Reference(beta=0.3),
            "teacher": Reference(beta=0.7, divergence="reverse_k3"),
        },
    )
    expected_reward = (world.probabilities * world.rewards).sum()
    cost = 0.3 * world.regulariser("reverse_kl") + 0.7 * other.regulariser("reverse_k3")
    log_ratios = torch.stack([world.log_ratios, other.log_ratios], -1)
    return objective, log_ratios, world.gradient(expected_reward - cost)


def test_two_references_at_once() -> None:
    world = make_world()
    objective, log_ratios, want = two_references(world)
    mask = world.group(world.mask)
    outcome = outcome_advantages(world.group(world.rewards), GROUP, "dr_grpo")
    terms = objective.process_terms(world.group(log_ratios), mask)
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
