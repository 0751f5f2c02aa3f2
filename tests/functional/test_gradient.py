"""The surrogate's gradient is the gradient of the paper's objective, by enumerating everything.

A tabular autoregressive policy over three tokens, one of them EOS, of at most four tokens: 31
completions of length 1 to 4. Q(θ) = ℓ(E r) - β E Σ_t f(u_t) is computed from all of them and
differentiated by autograd; the surrogate is the public API, which does not use Q.

`pytest -s` prints the relative errors.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from prl_lightning.functional import (
    Divergence,
    Totals,
    kl_in_reward_step,
    kl_in_reward_trajectory,
    kl_loss,
    outcome_advantages,
    policy_loss,
    prl_advantages,
    process_term,
)

VOCABULARY, EOS = 3, 0
BETA = 0.3

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
}


@dataclass(frozen=True)
class World:
    """Every completion of a tabular policy, and what the policy and reference say of them."""

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

    def regulariser(self, divergence: str) -> Tensor:
        """E Σ_t f(u_t)."""
        f = GENERATORS[divergence]
        costs = torch.where(self.mask, f((-self.log_ratios).exp()), 0.0).sum(-1)
        return (self.probabilities * costs).sum()

    def objective(self, divergence: str, utility: str) -> Tensor:
        expected_reward = (self.probabilities * self.rewards).sum()
        return UTILITIES[utility](expected_reward) - BETA * self.regulariser(divergence)

    def in_group(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rewards, log-ratios and mask of some rows."""
        return self.rewards[rows], self.log_ratios[rows], self.mask[rows]

    def gradient(self, value: Tensor) -> Tensor:
        return torch.autograd.grad(value, self.table)[0]

    def surrogate_gradient(self, advantages: Tensor, rows: Tensor | None = None) -> Tensor:
        """Minus the expected gradient of the loss: each completion weighted by its probability.

        With `rows`, a group of completions in proportion to their probability, without weights.
        """
        policy, mask = self.logprobs(self.table), self.mask
        weights: Tensor | None = self.probabilities.detach()[:, None].expand(mask.shape)
        if rows is not None:
            policy, mask, weights = policy[rows], mask[rows], None
        loss, stats = policy_loss(
            policy,
            policy.detach(),
            advantages,
            mask,
            aggregation="constant",
            token_weights=weights,
            totals=Totals(num_sequences=1 if rows is None else len(rows), max_length=1),
        )
        assert stats["ratio_max"] == 1  # on-policy
        return -self.gradient(loss)


def completions(max_length: int) -> list[tuple[int, ...]]:
    """All sequences that end at the first EOS or at the limit."""
    found = []
    for length in range(1, max_length + 1):
        for ids in itertools.product(range(VOCABULARY), repeat=length):
            if EOS not in ids[:-1] and (ids[-1] == EOS or length == max_length):
                found.append(ids)
    return found


def make_world(rewards: str, max_length: int = 4, table: Tensor | None = None) -> World:
    generator = torch.Generator().manual_seed(20)
    sequences = completions(max_length)
    prefixes = sorted({ids[:t] for ids in sequences for t in range(len(ids))})
    shape = (len(sequences), max_length)
    states, ids = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    mask = torch.zeros(shape, dtype=torch.bool)
    for i, sequence in enumerate(sequences):
        for t, token in enumerate(sequence):
            states[i, t], ids[i, t], mask[i, t] = prefixes.index(sequence[:t]), token, True
    size = (len(prefixes), VOCABULARY)
    drawn = torch.randn(size, generator=generator, dtype=torch.float64)
    ref_table = torch.randn(size, generator=generator, dtype=torch.float64)
    values = torch.randn(len(sequences), generator=generator, dtype=torch.float64)
    return World(
        table=(drawn if table is None else table[: len(prefixes)]).requires_grad_(),
        ref_table=ref_table,
        rewards=(values > 0).double() if rewards == "binary" else values,
        states=states,
        ids=ids,
        mask=mask,
    )


def rational_table() -> Tensor:
    """Each state's probabilities are 1/2, 1/4 and 1/4 in some order; a completion's are n/256."""
    orders = list({*itertools.permutations((0.5, 0.25, 0.25))})
    rows = [sorted(orders)[state % len(orders)] for state in range(15)]
    return torch.tensor(rows, dtype=torch.float64).log()


@pytest.fixture(autouse=True)
def _print_the_test(request: pytest.FixtureRequest) -> None:
    print(f"\n{request.node.name:<80}", end="")


def relative_error(got: Tensor, want: Tensor) -> float:
    error = ((got - want).norm() / want.norm()).item()
    print(f"{error:9.1e}", end="")
    return error


def surrogate_error(
    world: World, advantages: Tensor, divergence: str, utility: str, rows: Tensor | None = None
) -> float:
    want = world.gradient(world.objective(divergence, utility))
    return relative_error(world.surrogate_gradient(advantages, rows), want)


def test_world_is_complete() -> None:
    world = make_world("binary")
    assert len(world.rewards) == 1 + 2 + 4 + 24
    assert world.mask.sum(-1).unique().tolist() == [1, 2, 3, 4]
    assert world.probabilities.sum().item() == pytest.approx(1, abs=1e-12)
    assert 0.2 < (world.probabilities * world.rewards).sum() < 0.8


@pytest.mark.parametrize("divergence", GENERATORS)
@pytest.mark.parametrize("outcome", ["linear, reward", "linear, mean", "arcsin, mean/std"])
def test_gradient_is_the_papers(divergence: str, outcome: str) -> None:
    utility = outcome.split(",")[0]
    world = make_world("binary" if utility == "arcsin" else "real")
    mean = (world.probabilities * world.rewards).sum().detach()
    advantages = {
        "linear, reward": outcome_advantages(world.rewards, group_size=1, kind="reward"),
        # The limits of an infinite group; the two tests below have groups that reach them.
        "linear, mean": world.rewards - mean,
        "arcsin, mean/std": (world.rewards - mean) / (mean * (1 - mean)).sqrt(),
    }[outcome]
    weights = prl_advantages(
        advantages, world.log_ratios, world.mask, BETA, CUSTOM.get(divergence, divergence)
    )
    assert surrogate_error(world, weights, divergence, utility) < 1e-9


@pytest.mark.parametrize("divergence", GENERATORS)
@pytest.mark.parametrize(
    ("kind", "utility"), [("grpo", "arcsin"), ("dr_grpo", "linear"), ("reward", "linear")]
)
def test_gradient_of_one_group_that_realises_the_policy(
    divergence: str, kind: str, utility: str
) -> None:
    """256 samples in exact proportion, through the public functions alone: no weights, no limit."""
    world, rows = world_as_a_group("binary" if utility == "arcsin" else "real")
    advantages = prl_advantages(
        outcome_advantages(world.rewards[rows], group_size=256, kind=kind),
        *world.in_group(rows)[1:],
        BETA,
        CUSTOM.get(divergence, divergence),
    )
    assert surrogate_error(world, advantages, divergence, utility, rows) < 1e-9


def world_as_a_group(rewards: str) -> tuple[World, Tensor]:
    world = make_world(rewards, table=rational_table())
    counts = world.probabilities.detach() * 256
    assert torch.allclose(counts, counts.round(), rtol=0, atol=1e-9)
    return world, torch.arange(len(counts)).repeat_interleave(counts.round().long())


def test_grpo_is_the_arcsin_advantage() -> None:
    """A = (r - p)/√(p(1 - p)) = ℓ'(p)·(r - p) with ℓ = 2·arcsin√: Proposition 3.1."""
    rewards = torch.tensor([1.0] * 3 + [0.0] * 5, dtype=torch.float64)
    p = torch.tensor(3 / 8, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(UTILITIES["arcsin"](p), p)
    got = outcome_advantages(rewards, group_size=8, kind="grpo")
    torch.testing.assert_close(got, slope * (rewards - 3 / 8), rtol=1e-14, atol=0)
    assert got[0].item() == pytest.approx(math.sqrt(5 / 3), rel=1e-14)


def test_trajectory_kl_in_reward_has_the_gradient_when_linear() -> None:
    """Σ_{j<t} δ_j does not depend on a_t, so without group statistics it is only noise."""
    world = make_world("real")
    shaped = kl_in_reward_trajectory(world.rewards, world.log_ratios, world.mask, BETA)
    advantages = outcome_advantages(shaped, group_size=1, kind="reward")
    assert surrogate_error(world, advantages, "reverse_kl", "linear") < 1e-9


def test_step_kl_in_reward_has_the_gradient_when_linear() -> None:
    """A mean over the completions that reach t does not depend on a_t: a baseline."""
    world, rows = world_as_a_group("real")
    shaped = kl_in_reward_step(*world.in_group(rows), BETA)
    advantages = outcome_advantages(shaped, 256, "dr_grpo", world.mask[rows])
    assert surrogate_error(world, advantages, "reverse_kl", "linear", rows) < 1e-9


def test_kl_in_reward_is_not_the_arcsin_gradient() -> None:
    """Group statistics of the shaped reward change the objective: PRL decouples them."""
    world, rows = world_as_a_group("binary")
    args, mask = (*world.in_group(rows), BETA), world.mask[rows]
    for advantages in (
        outcome_advantages(kl_in_reward_trajectory(*args), 256, "grpo"),
        outcome_advantages(kl_in_reward_step(*args), 256, "grpo", mask),
    ):
        assert surrogate_error(world, advantages, "reverse_kl", "arcsin", rows) > 1e-2


def kl_loss_gradient(world: World, estimator: str) -> Tensor:
    """The expected gradient of the KL loss, completion by completion."""
    policy, ref = world.logprobs(world.table), world.logprobs(world.ref_table)
    totals = Totals(num_sequences=1, max_length=1)
    losses = [
        kl_loss(*rows, estimator, aggregation="constant", totals=totals)
        for rows in zip(*(x[:, None] for x in (policy, ref, world.mask)), strict=True)
    ]
    return world.gradient((world.probabilities.detach() * torch.stack(losses)).sum())


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "k3+"])
@pytest.mark.parametrize("divergence", ["reverse_kl", "reverse_k3", "forward_kl", "forward_k3"])
def test_kl_loss_is_not_the_gradient(estimator: str, divergence: str) -> None:
    world = make_world("real")
    # The regulariser alone, so that a large outcome gradient cannot hide the difference.
    want = world.gradient(world.regulariser(divergence))
    assert relative_error(kl_loss_gradient(world, estimator), want) > 1e-2


@pytest.mark.parametrize("estimator", ["k2", "k3+"])
def test_kl_loss_lacks_exactly_the_future(estimator: str) -> None:
    """∇ KL = E Σ_t (δ_t + Σ_{j>t} δ_j) ∇ log π_t; the loss has δ_t, the process term has both."""
    world = make_world("real")
    log_ratios = world.log_ratios.detach()
    future = process_term(log_ratios, world.mask) - log_ratios
    want = world.gradient(world.regulariser("reverse_kl"))
    got = kl_loss_gradient(world, estimator) + world.surrogate_gradient(future)
    assert relative_error(got, want) < 1e-9


def test_kl_loss_k1_has_no_gradient() -> None:
    assert kl_loss_gradient(make_world("real"), "k1").abs().max() < 1e-12


def test_kl_loss_k2_is_the_gradient_of_single_tokens() -> None:
    """The control: without a future there is nothing to lack, and the same code agrees."""
    world = make_world("real", max_length=1)
    want = world.gradient(world.regulariser("reverse_kl"))
    assert relative_error(kl_loss_gradient(world, "k2"), want) < 1e-9
