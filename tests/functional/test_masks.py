import pytest
import torch
from hypothesis import given

from prl_lightning.functional.masks import keep_tokens, later_sums, suffix_sums

from .batches import Batch, assert_close, batches, quick


@quick
@given(batches())
def test_suffix_sums_are_loops(batch: Batch) -> None:
    values = batch.log_ratios.nan_to_num(0.5)
    for sums, skipped in ((suffix_sums, 0), (later_sums, 1)):
        want = [[sum(row[t + skipped :]) for t in range(len(row))] for row in values.tolist()]
        assert_close(sums(values), torch.tensor(want, dtype=values.dtype).view(values.shape))


def test_later_sums_keep_small_terms_behind_a_large_one() -> None:
    assert later_sums(torch.tensor([[1e12, 0.25, 0.5]])).tolist() == [[0.75, 0.5, 0.0]]


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf])
def test_padding_leaks_into_neither_value_nor_gradient(garbage: float) -> None:
    values = torch.tensor([[1.0, garbage, 3.0]], requires_grad=True)
    kept = keep_tokens(values, torch.tensor([[1, 0, 1]]), "values")
    assert kept.tolist() == [[1.0, 0.0, 3.0]]
    (grad,) = torch.autograd.grad(kept.square().sum(), values)
    assert grad.tolist() == [[2.0, 0.0, 6.0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64])
def test_dtype_is_fit_for_sums(dtype: torch.dtype) -> None:
    values = keep_tokens(torch.ones(1, 2, dtype=dtype), torch.ones(1, 2), "values")
    assert values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize(("shape", "mask"), [((2, 3), (2, 4)), ((3,), (3,))])
def test_shapes_that_disagree_are_named(shape: tuple[int, ...], mask: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"log_ratios has shape \(.*\(B, T\)"):
        keep_tokens(torch.zeros(shape), torch.ones(mask), "log_ratios")
