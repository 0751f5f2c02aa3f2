from __future__ import annotations

import pytest
import torch
from hypothesis import given
from torch import Tensor

from prl_lightning.functional import others_mean, process_term, register_shape

from .batches import Batch, assert_close, batches, quick


@quick
@given(batch=batches())
def test_scaled_terms_are_loops(batch: Batch) -> None:
    reg = process_term(batch.log_ratios, batch.mask)
    for shape, scale in (
        ("per_remaining", lambda t, row: len(row) - row.index(t)),
        ("per_length", lambda t, row: len(row)),
    ):
        got = process_term(batch.log_ratios, batch.mask, shape=shape)
        want = batch.by_loop(lambda i, t, row, scale=scale: reg[i, t].item() / scale(t, row))
        assert_close(got, want)


@quick
@given(batch=batches())
def test_shuffled_values_are_the_same_in_another_order(batch: Batch) -> None:
    reg = process_term(batch.log_ratios, batch.mask)
    got = process_term(batch.log_ratios, batch.mask, shape="shuffled")
    for i, row in enumerate(batch.rows()):
        assert sorted(got[i, row].tolist()) == sorted(reg[i, row].tolist())
    assert_close(torch.where(batch.mask, 0.0, got), torch.zeros_like(got))


def test_the_order_depends_on_the_length_alone() -> None:
    """Not on the other rows of a micro-batch, nor on a place in the batch or its padding."""
    values = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    alone = process_term(values[None], torch.ones(1, 5), shape="shuffled")
    padded = torch.zeros(3, 7)
    padded[2, :5] = values
    mask = torch.zeros(3, 7)
    mask[2, :5] = 1
    mask[0, :3] = 1
    assert torch.equal(process_term(padded, mask, shape="shuffled")[2, :5], alone[0])
    assert alone[0].tolist() != process_term(values[None], torch.ones(1, 5))[0].tolist()


@quick
@given(batch=batches())
def test_the_mean_of_the_others_is_a_loop(batch: Batch) -> None:
    rows = batch.rows()
    reg = process_term(batch.log_ratios, batch.mask)

    def mean(i: int, t: int, row: list[int]) -> float:
        others = [reg[k, t].item() for k in range(len(rows)) if k != i and t in rows[k]]
        return sum(others) / len(others) if others else 0.0

    assert_close(others_mean(reg, batch.mask, max(1, len(rows))), batch.by_loop(mean))


def test_groups_are_apart() -> None:
    reg = torch.tensor([[1.0], [3.0], [10.0], [30.0]])
    assert others_mean(reg, torch.ones(4, 1), 2).flatten().tolist() == [3.0, 1.0, 30.0, 10.0]
    assert others_mean(reg, torch.ones(4, 1), 1).flatten().tolist() == [0.0] * 4


def test_a_registered_shape_gets_term_and_mask() -> None:
    def last_only(reg: Tensor, mask: Tensor) -> Tensor:
        assert mask.dtype == torch.bool
        return torch.where(mask.int().cumsum(-1) == mask.sum(-1, keepdim=True), reg, 0.0)

    register_shape("last_only", last_only)
    delta, mask = torch.tensor([[1.0, 2.0, 9.0]]), torch.tensor([[1, 1, 0]])
    assert process_term(delta, mask, shape="last_only").tolist() == [[0.0, 2.0, 0.0]]
    with pytest.raises(ValueError, match="shape='unheard'"):
        process_term(delta, mask, shape="unheard")
