import pytest
import torch
from hypothesis import given

from prl_lightning.functional.masks import keep_tokens, later_sums, suffix_sums

from .batches import Batch, batches, quick


@quick
@given(batches())
def test_suffix_sums_are_loops(batch: Batch) -> None:
    values = batch.log_ratios.nan_to_num(0.5)
    for i, row in enumerate(values.tolist()):
        for t in range(len(row)):
            assert suffix_sums(values)[i, t].item() == pytest.approx(sum(row[t:]), abs=1e-12)
            assert later_sums(values)[i, t].item() == pytest.approx(sum(row[t + 1 :]), abs=1e-12)


def test_later_sums_keep_small_terms_behind_a_large_one() -> None:
    values = torch.tensor([[1e12, 0.25, 0.5]])
    assert later_sums(values).tolist() == [[0.75, 0.5, 0.0]]


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf])
def test_padding_leaks_into_neither_value_nor_gradient(garbage: float) -> None:
    values = torch.tensor([[1.0, garbage, 3.0]], requires_grad=True)
    kept = keep_tokens(values.exp(), torch.tensor([[1, 0, 1]]), "values")
    assert kept[0, 1] == 0
    kept = keep_tokens(values, torch.tensor([[1, 0, 1]]), "values")
    kept.square().sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [[2.0, 0.0, 6.0]]


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.int64, torch.float32),
    ],
)
def test_dtype_is_fit_for_sums(dtype: torch.dtype, kept: torch.dtype) -> None:
    values = keep_tokens(torch.ones(1, 2, dtype=dtype), torch.ones(1, 2), "values")
    assert values.dtype == kept


def test_shapes_that_disagree_are_named() -> None:
    with pytest.raises(ValueError, match=r"log_ratios has shape \(2, 3\).*\(2, 4\).*\(B, T\)"):
        keep_tokens(torch.zeros(2, 3), torch.ones(2, 4), "log_ratios")
    with pytest.raises(ValueError, match=r"log_ratios has shape \(3,\).*\(3,\).*\(B, T\)"):
        keep_tokens(torch.zeros(3), torch.ones(3), "log_ratios")
