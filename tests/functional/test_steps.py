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
    want = torch.zeros_like(batch.mask)
    for i, positions in enumerate(batch.rows()):
        for number, t in enumerate(positions, start=1):
            want[i, t] = number % length == 0 or number == len(positions)
    assert torch.equal(fixed_length_steps(batch.mask, length), want)


def test_fixed_length_steps_by_hand() -> None:
    mask = torch.tensor([[0, 1, 1, 0, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0, 0, 0], [0] * 8])
    assert fixed_length_steps(mask, 2).int().tolist() == [
        [0, 0, 1, 0, 0, 1, 1, 0],
        [0, 1, 0, 0, 0, 0, 0, 0],
        [0] * 8,
    ]


@quick
@given(batches())
def test_steps_of_length_one_are_the_tokens(batch: Batch) -> None:
    assert torch.equal(fixed_length_steps(batch.mask, 1), batch.mask)


@quick
@given(batches())
def test_delimiter_steps_is_a_loop(batch: Batch) -> None:
    ids = (batch.noise(1).nan_to_num(-300.0) * 3).long().where(batch.mask, torch.tensor(-100))
    ids = torch.where(batch.mask, ids % 5, ids)
    table = torch.tensor([False, True, False, True, False])
    want = torch.zeros_like(batch.mask)
    for i, positions in enumerate(batch.rows()):
        for t in positions:
            want[i, t] = t == positions[-1] or bool(table[ids[i, t]])
    assert torch.equal(delimiter_steps(ids, batch.mask, table), want)


@quick
@given(batches())
def test_take_at_step_end_is_a_loop(batch: Batch) -> None:
    values = batch.log_ratios
    values = torch.where(values.abs() < 0.5, 0.0, values)  # true zeros, many
    ends = batch.noise(1).nan_to_num(1.0) > 0.5  # ends in the padding too, and some rows without
    want = torch.zeros_like(values)
    for i, positions in enumerate(batch.rows()):
        for t in positions:
            later = [j for j in positions if j >= t and (ends[i, j] or j == positions[-1])]
            want[i, t] = values[i, later[0]]
    assert torch.equal(take_at_step_end(values, batch.mask, ends), want)


def test_a_true_zero_at_a_step_end_is_kept() -> None:
    values, ends = torch.tensor([[7.0, 0.0, 5.0, 0.0]]), torch.tensor([[0, 1, 0, 1]])
    assert take_at_step_end(values, torch.ones(1, 4), ends).tolist() == [[0.0, 0.0, 0.0, 0.0]]
    values = torch.tensor([[7.0, 0.0, 5.0, 3.0]])
    assert take_at_step_end(values, torch.ones(1, 4), ends).tolist() == [[0.0, 0.0, 3.0, 3.0]]


@quick
@given(batches())
def test_last_tokens_is_a_loop(batch: Batch) -> None:
    want = torch.zeros_like(batch.mask)
    for i, positions in enumerate(batch.rows()):
        if positions:
            want[i, positions[-1]] = True
    assert torch.equal(last_tokens(batch.mask), want)


def test_errors_name_the_field_the_value_and_the_mend() -> None:
    mask = torch.ones(1, 3)
    with pytest.raises(ValueError, match="length is 0: a step has at least 1 token"):
        fixed_length_steps(mask, 0)
    with pytest.raises(ValueError, match=r"completion_ids holds 9 .*4 entries.*embedding"):
        delimiter_steps(torch.tensor([[0, 9, 1]]), mask, torch.zeros(4, dtype=torch.bool))
    for outside in (-1, 4):
        with pytest.raises(ValueError, match=f"completion_ids holds {outside} but"):
            delimiter_steps(torch.tensor([[0, outside, 1]]), mask, torch.zeros(4).bool())
    with pytest.raises(ValueError, match=r"completion_ids has shape \(1, 2\)"):
        delimiter_steps(torch.zeros(1, 2).long(), mask, torch.zeros(4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"step_ends has shape \(1, 2\)"):
        take_at_step_end(torch.zeros(1, 3), mask, torch.zeros(1, 2))
