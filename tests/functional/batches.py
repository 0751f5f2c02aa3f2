"""Batches for hypothesis: any shape, masks with holes and empty rows, NaN in all the padding."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

AGGREGATIONS = ["token_mean", "sequence_mean", "constant"]
DIVERGENCES = ["reverse_kl", "reverse_k3", "forward_kl", "forward_k3"]

quick = settings(max_examples=40, deadline=None)


@dataclass(frozen=True)
class Batch:
    mask: Tensor
    """(B, T) bool."""
    log_ratios: Tensor
    """(B, T) float64, NaN outside the mask."""
    rewards: Tensor
    """(B,) float64."""
    group_size: int = 1
    seed: int = 0

    def noise(self, salt: int) -> Tensor:
        """Another (B, T) of the same kind as `log_ratios`."""
        values = torch.randn(self.mask.shape, generator=_generator(self.seed + salt)).double()
        return values.masked_fill(~self.mask, torch.nan)

    def rows(self) -> list[list[int]]:
        """The positions of each row's tokens."""
        return [[t for t, kept in enumerate(row) if kept] for row in self.mask.tolist()]

    def by_loop(self, value: Callable[[int, int, list[int]], float]) -> Tensor:
        """(B, T) float64 of value(row, position, positions of the row), zero outside the mask."""
        result = torch.zeros(self.mask.shape, dtype=torch.float64)
        for i, positions in enumerate(self.rows()):
            for t in positions:
                result[i, t] = value(i, t, positions)
        return result

    def delta(self, i: int, positions: list[int]) -> list[float]:
        return [self.log_ratios[i, t].item() for t in positions]


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@st.composite
def batches(draw: st.DrawFn, max_groups: int = 3) -> Batch:
    group_size = draw(st.integers(1, 4), label="group_size")
    rows = group_size * draw(st.integers(0, max_groups), label="groups")
    tokens = draw(st.integers(0, 7), label="tokens")
    density = draw(st.sampled_from([0.0, 0.3, 0.7, 1.0]), label="density")
    seed = draw(st.integers(0, 2**20), label="seed")
    generator = _generator(seed)
    mask = torch.rand(rows, tokens, generator=generator) < density
    mask &= torch.rand(rows, 1, generator=generator) < 0.85  # some rows without any token
    log_ratios = (
        torch.randn(rows, tokens, generator=generator).double().masked_fill(~mask, torch.nan)
    )
    binary = draw(st.booleans(), label="binary rewards")
    rewards = torch.randn(rows, generator=generator).double()
    return Batch(mask, log_ratios, (rewards > 0).double() if binary else rewards, group_size, seed)


def assert_close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def value_and_slope(loss: Tensor, leaf: Tensor) -> tuple[float, float]:
    """A scalar and its derivative in a one-element tensor."""
    (slope,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.item(), slope.item()


def slow_aggregate(values: Tensor, batch: Batch, kind: str, max_length: int) -> float:
    """`aggregate` as loops over lists."""
    rows = [[values[i, t].item() for t in positions] for i, positions in enumerate(batch.rows())]
    rows = [row for row in rows if row]
    if not rows:
        return 0.0
    if kind == "token_mean":
        return sum(map(sum, rows)) / sum(map(len, rows))
    if kind == "sequence_mean":
        return sum(sum(row) / len(row) for row in rows) / len(rows)
    return sum(map(sum, rows)) / (len(rows) * max_length)
