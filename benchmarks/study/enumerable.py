"""A policy small enough to enumerate: every completion, its probability and its gradient.

Over three tokens, one of them EOS, and at most four tokens: 31 completions of length 1 to 4.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from prl_lightning.functional import Aggregation, Divergence, kl_loss, policy_loss

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
