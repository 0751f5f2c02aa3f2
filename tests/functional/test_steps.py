import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prl_lightning.functional import delimiter_steps, fixed_length_steps
from prl_lightning.functional.steps import last_tokens, take_at_step_end

from .batches import Batch, batches, quick


@quick
@given(batches(), st.integers(1, 9))
def test_fixed_length_steps_is_a_loop(batch: Batch, length: int) -> None:
    def ends(i: int, t: int, row: list[int]) -> bool:
        return (row.index(t) + 1) % length == 0 or t == row[-1]

    assert torch.equal(fixed_length_steps(batch.mask, length), batch.by_loop(ends).bool())


def test_fixed_length_steps_by_hand() -> None:
    mask = torch.tensor([[0, 1, 1, 0, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0, 0, 0], [0] * 8])
    assert fixed_length_steps(mask, 2).int().tolist() == [
        [0, 0, 1, 0, 0, 1, 1, 0],
        [0, 1, 0, 0, 0, 0, 0, 0],
        [0] * 8,
    ]


@quick
@given(batches())
def test_delimiter_steps_is_a_loop(batch: Batch) -> None:
    ids = (batch.noise(1).nan_to_num(0) * 3).long() % 5
    ids = torch.where(batch.mask, ids, -100)
    table = torch.tensor([False, True, False, True, False])
    want = batch.by_loop(lambda i, t, row: t == row[-1] or bool(table[ids[i, t]]))
    assert torch.equal(delimiter_steps(ids, batch.mask, table), want.bool())


@quick
@given(batches())
def test_take_at_step_end_is_a_loop(batch: Batch) -> None:
    values = batch.log_ratios
    values = torch.where(values.abs() < 0.5, 0.0, values)  # true zeros, many
    ends = batch.noise(1).nan_to_num(1.0) > 0.5  # ends in the padding too, and some rows without

    def at_end(i: int, t: int, row: list[int]) -> float:
        return values[i, next(j for j in row if j >= t and (ends[i, j] or j == row[-1]))].item()

    assert torch.equal(take_at_step_end(values, batch.mask, ends), batch.by_loop(at_end))


@pytest.mark.parametrize("last", [0.0, 3.0])
def test_a_true_zero_at_a_step_end_is_kept(last: float) -> None:
    values, ends = torch.tensor([[7.0, 0.0, 5.0, last]]), torch.tensor([[0, 1, 0, 1]])
    assert take_at_step_end(values, torch.ones(1, 4), ends).tolist() == [[0.0, 0.0, last, last]]


@quick
@given(batches())
def test_last_tokens_is_a_loop(batch: Batch) -> None:
    want = batch.by_loop(lambda i, t, row: t == row[-1])
    assert torch.equal(last_tokens(batch.mask), want.bool())


def test_errors() -> None:
    mask, table = torch.ones(1, 3), torch.zeros(4, dtype=torch.bool)
    with pytest.raises(ValueError, match="length=0"):
        fixed_length_steps(mask, 0)
    for outside in (-1, 4):
        with pytest.raises(ValueError, match=f"token {outside}, .*4 entries"):
            delimiter_steps(torch.tensor([[0, outside, 1]]), mask, table)
    with pytest.raises(ValueError, match=r"completion_ids has shape \(1, 2\)"):
        delimiter_steps(torch.zeros(1, 2).long(), mask, table)
    with pytest.raises(ValueError, match=r"step_ends has shape \(1, 2\)"):
        take_at_step_end(torch.zeros(1, 3), mask, torch.zeros(1, 2))
