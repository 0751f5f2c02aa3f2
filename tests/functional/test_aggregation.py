import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from prl_lightning.functional import (
    Totals,
    aggregate,
    kl_loss,
    policy_loss,
)

from .batches import AGGREGATIONS, Batch, batches, quick, slow_aggregate


@pytest.mark.parametrize("kind", AGGREGATIONS)
@quick
@given(batch=batches())
def test_aggregate_is_a_loop(kind: str, batch: Batch) -> None:
    got = aggregate(batch.log_ratios, batch.mask, kind, totals=Totals(max_length=10))
    assert got.item() == pytest.approx(slow_aggregate(batch.log_ratios, batch, kind, 10), abs=1e-12)


def test_aggregate_by_hand() -> None:
    values = torch.tensor([[1.0, 2.0, 3.0], [10.0, math.nan, math.inf], [math.nan] * 3])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]])
    assert aggregate(values, mask, "token_mean").item() == 4.0  # 16 / 4
    assert aggregate(values, mask, "sequence_mean").item() == 6.0  # (2 + 10) / 2
    assert aggregate(values, mask, "constant", Totals(max_length=8)).item() == 1.0  # 16 / (2·8)
    assert aggregate(values, mask, "token_mean", Totals(num_tokens=8)).item() == 2.0
    assert aggregate(values, mask, "sequence_mean", Totals(num_sequences=3)).item() == 4.0
    assert aggregate(values, mask, "constant", Totals(None, 4, 8)).item() == 0.5


def test_totals_may_be_tensors_fractions_or_zero() -> None:
    """All-reduced counts are tensors; a rank's share of them need not be whole."""
    values, mask = torch.tensor([[1.0, 2.0]], dtype=torch.float64), torch.ones(1, 2)
    assert aggregate(values, mask, totals=Totals(num_tokens=torch.tensor(6))).item() == 0.5
    assert aggregate(values, mask, totals=Totals(num_tokens=0.3)).item() == 10.0
    nothing = torch.zeros(1, 2)
    assert aggregate(values, nothing, totals=Totals(num_tokens=0)).item() == 0
    assert (
        aggregate(
            values, nothing, "sequence_mean", totals=Totals(num_sequences=torch.tensor(0))
        ).item()
        == 0
    )


def batch_loss(batch: Batch, rows: slice, kind: str, totals: Totals) -> Tensor:
    """Policy and KL loss of some rows, with token weights: everything that is aggregated."""
    policy = batch.noise(1)[rows].requires_grad_()
    mask = batch.mask[rows]
    loss, _ = policy_loss(
        policy,
        batch.noise(2)[rows],
        batch.noise(3)[rows],
        mask,
        aggregation=kind,
        token_weights=batch.noise(4)[rows].exp(),
        totals=totals,
    )
    ref = batch.noise(5)[rows]
    total = loss + kl_loss(policy, ref, mask, "k3", aggregation=kind, totals=totals)
    (grad,) = torch.autograd.grad(total, policy)
    return torch.cat([total[None].detach(), grad.reshape(-1)])


@pytest.mark.parametrize("kind", AGGREGATIONS)
@quick
@given(batch=batches(), size=st.integers(1, 5))
def test_cutting_into_micro_batches_changes_nothing(kind: str, batch: Batch, size: int) -> None:
    """Loss and gradient; also cuts where a micro-batch holds no token."""
    totals = Totals(int(batch.mask.sum()), int(batch.mask.any(-1).sum()), max_length=16)
    want = batch_loss(batch, slice(None), kind, Totals(max_length=16))
    cuts = [slice(i, i + size) for i in range(0, len(batch.mask), size)]
    parts = [batch_loss(batch, rows, kind, totals) for rows in cuts]
    loss = sum((part[0] for part in parts), torch.tensor(0.0, dtype=torch.float64))
    grad = torch.cat([part[1:] for part in parts]) if parts else want[1:]
    torch.testing.assert_close(loss, want[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(grad, want[1:], rtol=1e-10, atol=1e-12)


def test_bfloat16_logprobs_are_summed_in_float32() -> None:
    ones = torch.ones(1, 4096, dtype=torch.bfloat16)
    assert (
        aggregate(ones, torch.ones(1, 4096), "token_mean", totals=Totals(num_tokens=1)).item()
        == 4096
    )


def test_errors_name_the_field_the_value_and_the_mend() -> None:
    values, mask = torch.zeros(2, 3), torch.ones(2, 3)
    with pytest.raises(ValueError, match="aggregation is 'mean'.*token_mean, sequence_mean, const"):
        aggregate(values, mask, "mean")
    with pytest.raises(ValueError, match="max_length is None.*completion limit"):
        aggregate(values, mask, "constant")
    with pytest.raises(ValueError, match=r"values has shape \(2, 3\).*\(2, 2\)"):
        aggregate(values, torch.ones(2, 2))
