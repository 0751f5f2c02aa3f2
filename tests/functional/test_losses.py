import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from prl_lightning.functional import Aggregation, kl_loss, policy_loss
from prl_lightning.functional.losses import LOSSES

from .batches import (
    AGGREGATIONS,
    Batch,
    assert_close,
    batches,
    quick,
    slow_aggregate,
    value_and_slope,
)

Token = tuple[float, float, bool]
"""Loss, its derivative in log pi, and whether clipping changes something."""


def clip_by_loop(ratio: float, a: float, low: float, high: float) -> Token:
    """PPO: -min(ρA, clip(ρ)A)."""
    bounded = min(max(ratio, 1 - low), 1 + high)
    if bounded * a < ratio * a:
        return -bounded * a, 0.0, True
    return -ratio * a, -ratio * a, False


def dual_clip_by_loop(ratio: float, a: float, low: float, high: float) -> Token:
    """Maximise max(min(ρA, clip(ρ)A), 3A) where A < 0."""
    loss, slope, is_clipped = clip_by_loop(ratio, a, low, high)
    return (-3 * a, 0.0, True) if a < 0 and -loss < 3 * a else (loss, slope, is_clipped)


def slow_row(
    surrogate: str, policy: list[float], old: list[float], a: list[float], low: float, high: float
) -> list[Token]:
    """Each loss of a completion's tokens, in plain floats."""
    ratios = [math.exp(new - before) for new, before in zip(policy, old, strict=True)]
    if surrogate == "gspo":
        # One ratio for the sequence, of the length-normalised likelihoods.
        ratio = (math.exp(sum(policy)) / math.exp(sum(old))) ** (1 / max(1, len(a)))
        ratios = [ratio] * len(a)
    if surrogate == "cispo":
        weights = [min(max(ratio, 1 - low), 1 + high) for ratio in ratios]
        rows = zip(weights, a, policy, ratios, strict=True)
        return [(-w * own * new, -w * own, w != ratio) for w, own, new, ratio in rows]
    loss = dual_clip_by_loop if surrogate == "dual_clip" else clip_by_loop
    return [loss(ratio, own, low, high) for ratio, own in zip(ratios, a, strict=True)]


@pytest.mark.parametrize("kind", AGGREGATIONS)
@pytest.mark.parametrize("surrogate", LOSSES.names())
@quick
@given(batch=batches(), low=st.floats(0.05, 0.5), high=st.floats(0.05, 0.5))
def test_losses_are_loops(surrogate: str, kind: str, batch: Batch, low: float, high: float) -> None:
    """Value, gradient and stats, with context tokens in the middle and token weights."""
    policy, old, advantages = (batch.noise(salt) for salt in (1, 2, 3))
    weights = batch.noise(4).exp()
    values, slopes = torch.zeros_like(policy), torch.zeros_like(policy)
    clipped = []
    for i, row in enumerate(batch.rows()):
        own = (tensor[i, row].tolist() for tensor in (policy, old, advantages))
        for t, token in zip(row, slow_row(surrogate, *own, low, high), strict=True):
            values[i, t], slopes[i, t] = (x * weights[i, t].item() for x in token[:2])
            clipped.append(token[2])

    policy.requires_grad_()
    aggregation = Aggregation(kind, max_length=16)
    got, stats = policy_loss(
        policy, old, advantages, batch.mask, low, high,
        surrogate=surrogate, aggregation=aggregation, token_weights=weights,
    )  # fmt: skip
    want = slow_aggregate(values, batch, kind, 16)
    assert got.item() == pytest.approx(want, rel=1e-9, abs=1e-12)
    (grad,) = torch.autograd.grad(got, policy)
    shares = torch.zeros_like(grad)  # of each token in the aggregate
    for i, row in enumerate(batch.rows()):
        for t in row:
            one = torch.zeros_like(grad)
            one[i, t] = 1.0
            shares[i, t] = slow_aggregate(one, batch, kind, 16)
    assert_close(grad, slopes * shares)
    ratios = (policy - old).exp()[batch.mask].tolist()
    count = len(ratios)
    assert {name: value.item() for name, value in stats.items()} == pytest.approx(
        {
            "clip_fraction": sum(clipped) / count if count else 0.0,
            "ratio_mean": sum(ratios) / count if count else 1.0,
            "ratio_max": max(ratios) if count else 1.0,
        }
    )


@quick
@given(batch=batches(), low=st.floats(0.01, 0.5), high=st.floats(0.01, 0.5))
def test_gspo_has_the_gradient_of_the_sequence_objective(
    batch: Batch, low: float, high: float
) -> None:
    """GSPO's Eq. 5, which autograd differentiates through the whole sequence's ratio."""
    policy, old = batch.noise(1).requires_grad_(), batch.noise(2)
    objective, count = torch.zeros((), dtype=torch.double), 0
    for i, row in enumerate(batch.rows()):
        if row:
            ratio = ((policy[i, row] - old[i, row]).sum() / len(row)).exp()
            a = batch.rewards[i]
            objective = objective + torch.minimum(ratio * a, ratio.clamp(1 - low, 1 + high) * a)
            count += 1
    assume(count)
    (want,) = torch.autograd.grad(-objective / count, policy)
    got, _ = policy_loss(
        policy, old, batch.rewards, batch.mask, low, high,
        surrogate="gspo", aggregation=Aggregation("sequence_mean"),
    )  # fmt: skip
    assert got.item() == pytest.approx(-objective.item() / count)
    assert_close(torch.autograd.grad(got, policy)[0], want)


@pytest.mark.parametrize(
    ("surrogate", "loss", "slope"),
    [
        ("clip", 6.0, 6.0),
        ("dual_clip", 3.0, 0.0),  # bounded by 3·|A|
        ("cispo", -1.3 * -1.0 * math.log(6), 1.3),  # beyond the clip, and still with a gradient
    ],
)
def test_a_bad_token_that_became_likely(surrogate: str, loss: float, slope: float) -> None:
    policy = torch.tensor([[math.log(6)]], dtype=torch.float64, requires_grad=True)
    args = torch.zeros(1, 1), torch.tensor([-1.0]), torch.ones(1, 1), 0.1, 0.3
    got, stats = policy_loss(policy, *args, surrogate=surrogate)
    assert value_and_slope(got, policy) == pytest.approx((loss, slope))
    assert stats["clip_fraction"] == (surrogate != "clip")


@pytest.mark.parametrize("surrogate", LOSSES.names())
@pytest.mark.parametrize("kind", AGGREGATIONS)
@quick
@given(batch=batches(), pad=st.integers(0, 3))
def test_padding_and_row_order_change_nothing(
    kind: str, surrogate: str, batch: Batch, pad: int
) -> None:
    order = torch.randperm(len(batch.mask), generator=torch.Generator().manual_seed(batch.seed))

    def other(values: Tensor, fill: float) -> Tensor:
        return torch.nn.functional.pad(values[order], (pad, 2 * pad), value=fill)

    tensors = [batch.noise(salt) for salt in range(3)]
    aggregation = Aggregation(kind, max_length=16)
    options: Any = {"aggregation": aggregation, "surrogate": surrogate}
    want, stats = policy_loss(*tensors, batch.mask, **options)
    padded, mask = [other(values, math.nan) for values in tensors], other(batch.mask.int(), 0)
    got, other_stats = policy_loss(*padded, mask, **options)
    assert_close(got, want)
    for name, value in stats.items():
        assert_close(other_stats[name], value)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope", "is_clipped"),
    [
        (1.0, 2.0, -2.0, -2.0, 0),
        (1.5, 2.0, -2 * 1.3, 0.0, 1),  # enough of a good token
        (0.5, 2.0, -2 * 0.5, -1.0, 0),  # too little of a good token: pull back
        (1.5, -2.0, 3.0, 3.0, 0),  # too much of a bad token: push down
        (0.5, -2.0, 2 * 0.9, 0.0, 1),  # little enough of a bad token
        (1.25, 2.0, -2.5, -2.5, 0),  # inside the asymmetric bounds
        (0.85, -2.0, 1.8, 0.0, 1),
        (1.5, 0.0, 0.0, 0.0, 0),
    ],
)
def test_clipping_by_hand(
    ratio: float, advantage: float, loss: float, slope: float, is_clipped: int
) -> None:
    """ε_low 0.1, ε_high 0.3; the slope is ∂ loss/∂ log π = -ρ·A where not clipped."""
    policy = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    mask, padded = torch.tensor([[1, 0]]), torch.nn.functional.pad(policy, (0, 1))
    got, stats = policy_loss(padded, torch.zeros(1, 2), torch.tensor([advantage]), mask, 0.1, 0.3)
    assert value_and_slope(got, policy) == pytest.approx((loss, slope))
    found = [stats[name].item() for name in ("clip_fraction", "ratio_mean", "ratio_max")]
    assert found == pytest.approx([is_clipped, ratio, ratio])


def test_on_policy_gradient_is_the_advantage() -> None:
    """Of each token, or of each completion."""
    policy, mask = torch.randn(2, 3, requires_grad=True), torch.tensor([[1, 1, 0], [1, 1, 1]])
    for advantages in (torch.randn(2, 3), torch.randn(2)):
        loss, _ = policy_loss(policy, policy, advantages, mask)
        (grad,) = torch.autograd.grad(loss, policy)
        torch.testing.assert_close(grad, -advantages.view(2, -1) * mask / 5)


def test_only_the_policy_gets_a_gradient() -> None:
    tensors = [torch.randn(1, 2, requires_grad=True) for _ in range(5)]
    policy, old, advantages, weights, ref = tensors
    mask = torch.ones(1, 2)
    loss, stats = policy_loss(policy, old, advantages, mask, token_weights=weights)
    (loss + kl_loss(policy, ref, mask)).backward()
    assert [tensor.grad is not None for tensor in tensors] == [True, False, False, False, False]
    assert not any(value.requires_grad for value in stats.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("log_ratio", [-1e4, -100.0, 100.0, 1e4])
@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("surrogate", LOSSES.names())
def test_extreme_ratios_stay_finite(
    surrogate: str, dtype: torch.dtype, log_ratio: float, advantage: float
) -> None:
    """exp(100) is inf in float32, and inf·0 NaN."""
    policy = torch.tensor([[log_ratio, -0.1]], dtype=dtype, requires_grad=True)
    old, mask = torch.tensor([[0.0, -0.1]], dtype=dtype), torch.ones(1, 2)
    loss, stats = policy_loss(
        policy, old, torch.tensor([[advantage, 1.0]]), mask, surrogate=surrogate
    )
    total = loss + kl_loss(policy, old, mask, "k3")
    (grad,) = torch.autograd.grad(total, policy)
    assert all(value.isfinite().all() for value in (total, grad, *stats.values()))


@pytest.mark.parametrize("kind", AGGREGATIONS)
def test_no_tokens_give_a_zero_loss_with_a_zero_gradient(kind: str) -> None:
    policy = torch.full((2, 3), math.nan, requires_grad=True)
    aggregation = Aggregation(kind, max_length=8)
    loss, _ = policy_loss(policy, policy, policy, torch.zeros(2, 3), aggregation=aggregation)
    (grad,) = torch.autograd.grad(loss, policy)
    assert (loss.item(), grad.abs().sum().item()) == (0, 0)


def test_errors() -> None:
    a, mask = torch.zeros(2, 3), torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"old_logprobs has shape \(2, 2\)"):
        policy_loss(a, torch.zeros(2, 2), a, mask)
    with pytest.raises(ValueError, match=r"advantages has shape \(3,\)"):
        policy_loss(a, a, torch.zeros(3), mask)
    with pytest.raises(ValueError, match=r"token_weights has shape \(2, 1\)"):
        policy_loss(a, a, a, mask, token_weights=torch.ones(2, 1))
