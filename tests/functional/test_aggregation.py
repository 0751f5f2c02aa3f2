import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from prl_lightning.functional import Aggregation, aggregate, kl_loss, policy_loss

from .batches import AGGREGATIONS, Batch, assert_close, batches, quick, slow_aggregate


@pytest.mark.parametrize("kind", AGGREGATIONS)
@quick
@given(batch=batches())
def test_aggregate_is_a_loop(kind: str, batch: Batch) -> None:
    got = aggregate(batch.log_ratios, batch.mask, Aggregation(kind, max_length=10))
    assert got.item() == pytest.approx(slow_aggregate(batch.log_ratios, batch, kind, 10), abs=1e-12)


@pytest.mark.parametrize(
    ("aggregation", "want"),
    [
        (Aggregation("token_mean"), 4.0),  # 16 / 4
        (Aggregation("sequence_mean"), 6.0),  # (2 + 10) / 2
        (Aggregation("constant", max_length=8), 1.0),  # 16 / (2·8)
        (Aggregation("token_mean", num_tokens=8), 2.0),
        (Aggregation("sequence_mean", num_sequences=3), 4.0),
        (Aggregation("constant", None, 4, 8), 0.5),
        # All-reduced counts are tensors; a rank's share of them need not be whole.
        (Aggregation("token_mean", num_tokens=torch.tensor(64)), 0.25),
        (Aggregation("token_mean", num_tokens=0.5), 32.0),
    ],
)
def test_aggregate_by_hand(aggregation: Aggregation, want: float) -> None:
    values = torch.tensor([[1.0, 2.0, 3.0], [10.0, math.nan, math.inf], [math.nan] * 3])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]])
    assert aggregate(values, mask, aggregation).item() == want


@pytest.mark.parametrize("zero", [0, torch.tensor(0)])
def test_an_update_without_tokens_has_a_loss_of_zero(zero: int | Tensor) -> None:
    values, nothing = torch.ones(1, 2), torch.zeros(1, 2)
    for kind in AGGREGATIONS:
        assert aggregate(values, nothing, Aggregation(kind, zero, zero, 8)).item() == 0


def batch_loss(batch: Batch, rows: slice, aggregation: Aggregation) -> Tensor:
    """Policy and KL loss of some rows, with token weights, and the gradient."""
    policy = batch.noise(1)[rows].requires_grad_()
    old, advantages, weights, ref = (batch.noise(salt)[rows] for salt in range(2, 6))
    mask = batch.mask[rows]
    loss, _ = policy_loss(
        policy,
        old,
        advantages,
        mask,
        aggregation=aggregation,
        token_weights=weights.exp(),
    )
    total = loss + kl_loss(policy, ref, mask, "k3", aggregation)
    (grad,) = torch.autograd.grad(total, policy)
    return torch.cat([total[None].detach(), grad.reshape(-1)])


@pytest.mark.parametrize("kind", AGGREGATIONS)
@quick
@given(batch=batches(), size=st.integers(1, 5))
def test_cutting_into_micro_batches_changes_nothing(kind: str, batch: Batch, size: int) -> None:
    """Loss and gradient; also cuts where a micro-batch holds no token."""
    totals = (int(batch.mask.sum()), int(batch.mask.any(-1).sum()))
    want = batch_loss(batch, slice(None), Aggregation(kind, max_length=16))
    cuts = [slice(i, i + size) for i in range(0, max(1, len(batch.mask)), size)]
    parts = [batch_loss(batch, rows, Aggregation(kind, *totals, 16)) for rows in cuts]
    assert_close(torch.stack([part[0] for part in parts]).sum(), want[0])
    assert_close(torch.cat([part[1:] for part in parts]), want[1:])


def test_bfloat16_is_summed_in_float32() -> None:
    ones = torch.ones(1, 4096, dtype=torch.bfloat16)
    assert aggregate(ones, torch.ones(1, 4096), Aggregation(num_tokens=1)).item() == 4096


@pytest.mark.parametrize(
    ("kind", "mask", "message"),
    [
        ("mean", torch.ones(2, 3), "aggregation='mean': .*token_mean, sequence_mean, constant"),
        ("constant", torch.ones(2, 3), "max_length=None"),
        ("token_mean", torch.ones(2, 2), r"values has shape \(2, 3\).*\(2, 2\)"),
    ],
)
def test_errors(kind: str, mask: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        aggregate(torch.zeros(2, 3), mask, Aggregation(kind))
