import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prl_lightning.functional import EngineCorrection
from prl_lightning.functional.engine_correction import LEVELS

from .batches import Batch, assert_close, batches, quick


@pytest.mark.parametrize("outside", ["truncate", "mask"])
@pytest.mark.parametrize("level", LEVELS.names())
@quick
@given(batch=batches(), low=st.floats(0, 1), high=st.floats(1, 5))
def test_weights_are_loops(level: str, outside: str, batch: Batch, low: float, high: float) -> None:
    """Ratios of probabilities multiplied over a completion's own tokens, context left out."""
    old, rollout = batch.noise(1), batch.noise(2)
    want, changed = torch.zeros_like(old), torch.zeros_like(batch.mask)
    for i, row in enumerate(batch.rows()):
        ratios = {t: math.exp(old[i, t]) / math.exp(rollout[i, t]) for t in row}
        for t in row:
            w = ratios[t]
            if level != "token":
                w = math.prod(ratios.values())
            if level == "sequence_mean":
                w = w ** (1 / len(row))
            changed[i, t] = not low <= w <= high
            if outside == "mask":
                want[i, t] = 0.0 if changed[i, t] else w
            else:
                want[i, t] = min(max(w, low), high)
    correction = EngineCorrection(level, outside, low, high)  # type: ignore[arg-type]
    old.requires_grad_()
    got, is_outside = correction.weights(old, rollout, batch.mask)
    assert not got.requires_grad
    assert_close(got.masked_fill(~batch.mask, 0.0), want)
    assert (is_outside & batch.mask).tolist() == changed.tolist()


def test_the_product_makes_the_expectation_exact() -> None:
    """Over all completions of two tokens: E_engine[w g] = E_trainer[g], but not by token."""
    generator = torch.Generator().manual_seed(0)
    trainer, engine = torch.randn(2, 3, 3, generator=generator).double().log_softmax(-1)
    first, second = torch.cartesian_prod(torch.arange(3), torch.arange(3)).T
    old, rollout = (torch.stack([t[0, first], t[1, second]], 1) for t in (trainer, engine))
    g = torch.randn(9, generator=generator).double()
    want = (old.sum(1).exp() * g).sum()
    errors = {}
    for level in LEVELS.names():
        correction = EngineCorrection(level, high=math.inf)
        weights, is_outside = correction.weights(old, rollout, torch.ones(9, 2))
        assert not is_outside.any()
        got = (rollout.sum(1).exp() * weights[:, 0] * g).sum()
        errors[level] = abs(got - want).item()
    assert errors["sequence"] < 1e-12
    assert min(errors["token"], errors["sequence_mean"]) > 1e-2


@pytest.mark.parametrize(("outside", "want"), [("truncate", [2.0, 0.5]), ("mask", [0.0, 0.0])])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_extreme_gap_stays_finite(outside: str, want: list[float], dtype: torch.dtype) -> None:
    """exp(1e4) is inf, and a sum of 1e4 gaps is as large."""
    gap = torch.tensor([[0.0], [-1e4]], dtype=dtype)
    for level in LEVELS.names():
        correction = EngineCorrection(level, outside, 0.5, 2.0)  # type: ignore[arg-type]
        got, is_outside = correction.weights(gap, gap.flip(0), torch.ones(2, 1))
        assert got.flatten().tolist() == want
        assert is_outside.all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"level": "word"}, "engine_correction.level='word': .*token, sequence, sequence_mean"),
        ({"outside": "drop"}, "engine_correction.outside='drop': .*'truncate', 'mask'"),
        ({"low": -0.1}, r"engine_correction\.low=-0\.1: "),
        ({"low": 1.5}, r"engine_correction\.low=1\.5: "),
        ({"high": 0.9}, r"engine_correction\.high=0\.9: "),
        ({"high": math.nan}, r"engine_correction\.high=nan: "),
    ],
)
def test_errors(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineCorrection(**settings)  # type: ignore[arg-type]


def test_shapes_that_disagree_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"rollout_logprobs has shape \(2, 1\)"):
        EngineCorrection().weights(torch.zeros(2, 3), torch.zeros(2, 1), torch.ones(2, 3))
