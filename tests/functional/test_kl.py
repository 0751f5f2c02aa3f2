import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from prl_lightning.functional import Aggregation, kl_estimate, kl_loss

from .batches import AGGREGATIONS, Batch, batches, quick, slow_aggregate, value_and_slope

VALUES: dict[str, Callable[[float], float]] = {
    "k1": lambda d: d,
    "k2": lambda d: d * d / 2,
    "k3": lambda d: math.exp(-d) - 1 + d,
    "k3+": lambda d: math.exp(-d) - 1 + d,
}
SLOPES: dict[str, Callable[[float], float]] = {
    "k1": lambda d: 1.0,
    "k2": lambda d: d,
    "k3": lambda d: 1 - math.exp(-d),
    "k3+": lambda d: d,
}


def leaf(value: float) -> Tensor:
    return torch.tensor([[value]], dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("estimator", VALUES)
@quick
@given(policy=st.floats(-9, 0), ref=st.floats(-9, 0))
def test_kl_estimate_is_its_equation(estimator: str, policy: float, ref: float) -> None:
    """Value and gradient; so k3+ has the value of k3 and the gradient of k2."""
    logprobs, delta = leaf(policy), policy - ref
    got = value_and_slope(kl_estimate(logprobs, leaf(ref), estimator), logprobs)
    want = (VALUES[estimator](delta), SLOPES[estimator](delta))
    assert got == pytest.approx(want, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    ("delta", "value", "slope"),
    [
        (-15.0, math.exp(15) - 16, 1 - math.exp(15)),
        (-25.0, math.exp(20) - 21, 0.0),  # bounded below by -20, and flat there
        (100.0, 99.0, 1.0),  # but not above
    ],
)
def test_k3_is_bounded_where_it_is_exponentiated(delta: float, value: float, slope: float) -> None:
    logprobs = leaf(delta)
    found = value_and_slope(kl_estimate(logprobs, leaf(0.0), "k3"), logprobs)
    assert found == pytest.approx((value, slope), rel=1e-12)


def test_precision() -> None:
    """k3 of nearly equal policies does not cancel; bfloat16 is subtracted in float32."""
    found = kl_estimate(torch.tensor([[1e-3, -1e-3]]), torch.zeros(1, 2), "k3")
    torch.testing.assert_close(found, torch.full((1, 2), 5e-7), rtol=1e-3, atol=1e-10)
    low = torch.tensor([[-256.0, -1.0]]).bfloat16()
    assert kl_estimate(low, low.flip(-1), "k1").tolist() == [[-255.0, 255.0]]


@pytest.mark.parametrize("estimator", ["k1", "k3", "k3+"])
def test_kl_estimates_are_unbiased(estimator: str) -> None:
    """Σ_a π(a)·estimate(a) = KL(π‖π_ref), over the whole vocabulary."""
    policy, ref = torch.randn(2, 1, 7, dtype=torch.float64).log_softmax(-1)
    expected = (policy.exp() * kl_estimate(policy, ref, estimator)).sum()
    want = torch.nn.functional.kl_div(ref, policy, log_target=True, reduction="sum")
    torch.testing.assert_close(expected, want)


@pytest.mark.parametrize("estimator", VALUES)
@pytest.mark.parametrize("kind", AGGREGATIONS)
@quick
@given(batch=batches())
def test_kl_loss_is_a_loop(estimator: str, kind: str, batch: Batch) -> None:
    policy, ref = batch.noise(1), batch.noise(2)
    values = batch.by_loop(lambda i, t, _: VALUES[estimator]((policy[i, t] - ref[i, t]).item()))
    got = kl_loss(policy, ref, batch.mask, estimator, Aggregation(kind, max_length=9))
    want = slow_aggregate(values, batch, kind, 9)
    assert got.item() == pytest.approx(want, rel=1e-9, abs=1e-12)


def test_errors() -> None:
    logprobs, mask = torch.zeros(2, 3), torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"estimator='k4': .*k1, k2, k3, k3\+"):
        kl_loss(logprobs, logprobs, mask, "k4")
    with pytest.raises(ValueError, match=r"ref_logprobs has shape \(2, 1\)"):
        kl_estimate(logprobs, torch.zeros(2, 1))
    with pytest.raises(ValueError, match=r"ref_logprobs has shape \(2, 1\)"):
        kl_loss(logprobs, torch.zeros(2, 1), mask)
