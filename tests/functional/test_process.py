import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from prl_lightning.functional import (
    Divergence,
    fixed_length_steps,
    outcome_advantages,
    prl_advantages,
    process_baseline,
    process_rewards,
    process_term,
)
from prl_lightning.functional.process import per_token

from .batches import DIVERGENCES, Batch, assert_close, batches, quick


def slow_reg(
    batch: Batch, divergence: str, i: int, t: int, row: list[int], discount: float = 1.0
) -> float:
    """The table of reg_t, in plain floats; a row has the places of the tokens in the mask."""
    own, later = batch.log_ratios[i, t].item(), batch.delta(i, [j for j in row if j > t])
    first, cost = {
        "reverse_kl": (own, lambda d: d),
        "reverse_k3": (own, lambda d: d + math.exp(-d) - 1),
        "forward_kl": (-own, lambda d: -d),
        "forward_k3": (1 - math.exp(-own), lambda d: math.exp(-d) * -d - math.exp(-d) + 1),
    }[divergence]
    return first + sum(discount**n * cost(d) for n, d in enumerate(later, start=1))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@quick
@given(batch=batches(), discount=st.sampled_from([0.0, 0.3, 0.9, 0.999, 1.0]))
def test_a_discounted_term_is_a_loop(divergence: str, batch: Batch, discount: float) -> None:
    got = process_term(batch.log_ratios, batch.mask, divergence, discount=discount)
    assert_close(got, batch.by_loop(lambda *at: slow_reg(batch, divergence, *at, discount)))


def test_a_discount_does_not_lose_what_is_far_away() -> None:
    """At 0.999 a token 8,000 places later still counts 3e-4: no division by γ^t could keep it."""
    delta, mask = torch.zeros(1, 8192), torch.ones(1, 8192)
    delta[0, -1] = 1.0
    got = process_term(delta, mask, discount=0.999)[0]
    torch.testing.assert_close(got[191].item(), 0.999**8000, rtol=5e-4, atol=0)
    assert process_term(delta, mask, discount=0.0)[0].tolist() == delta[0].tolist()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@quick
@given(batch=batches(), length=st.integers(1, 4))
def test_process_term_is_a_loop(divergence: str, batch: Batch, length: int) -> None:
    """Per token, and in steps that carry the value at their end; the last token ends one anyway."""

    def at_step_end(i: int, t: int, row: list[int]) -> float:
        end = min((row.index(t) // length + 1) * length, len(row)) - 1
        return slow_reg(batch, divergence, i, row[end], row)

    token = process_term(batch.log_ratios, batch.mask, divergence)
    assert_close(token, batch.by_loop(lambda *at: slow_reg(batch, divergence, *at)))
    ends = fixed_length_steps(batch.mask, length)
    steps = process_term(batch.log_ratios, batch.mask, divergence, ends)
    assert_close(steps, batch.by_loop(at_step_end))
    unsaid = process_term(batch.log_ratios, batch.mask, divergence, torch.zeros_like(batch.mask))
    assert_close(
        unsaid, batch.by_loop(lambda i, t, row: slow_reg(batch, divergence, i, row[-1], row))
    )


LOG2 = math.log(2)


@pytest.mark.parametrize(
    ("divergence", "want"),
    [
        ("reverse_kl", [0.0, -LOG2]),
        ("reverse_k3", [LOG2 + (-LOG2 + 2 - 1), -LOG2]),
        ("forward_kl", [0.0, LOG2]),
        ("forward_k3", [1 - 0.5 + (2 * LOG2 - 2 + 1), 1 - 2.0]),
    ],
)
def test_process_term_by_hand(divergence: str, want: list[float]) -> None:
    delta, mask = torch.tensor([[LOG2, -LOG2, 0.0]]), torch.tensor([[1, 1, 0]])
    torch.testing.assert_close(process_term(delta, mask, divergence), torch.tensor([[*want, 0.0]]))


def test_padding_costs_nothing_whatever_agreement_costs() -> None:
    """The papers' generators are 0 at u = 1, where the padding is; this one is 1."""
    generator = Divergence.from_generator(lambda u: u, torch.ones_like)
    got = process_term(torch.zeros(1, 3), torch.tensor([[1, 1, 0]]), generator)
    assert got.tolist() == [[1.0, 0.0, 0.0]]


@quick
@given(batch=batches(), beta=st.floats(0, 2))
def test_advantages_rewards_and_baseline_are_their_equations(batch: Batch, beta: float) -> None:
    rewards, mean = batch.rewards, torch.tensor(0.37, dtype=torch.float64)
    rows = rewards[:, None].expand(batch.mask.shape)
    varied = rows + batch.noise(1)
    reg = batch.by_loop(lambda *at: slow_reg(batch, "forward_k3", *at))
    for outcome, tokens in ((rewards, rows), (varied, varied)):
        got = prl_advantages(outcome, batch.log_ratios, batch.mask, beta, "forward_k3")
        assert_close(got, torch.where(batch.mask, tokens - beta * reg, 0.0))
    later = batch.by_loop(lambda i, t, row: sum(batch.delta(i, [j for j in row if j > t])))
    got = process_rewards(rewards, batch.log_ratios, batch.mask, beta)
    assert_close(got, torch.where(batch.mask, rows - beta * later, 0.0))
    got = process_baseline(batch.mask, mean)
    assert_close(got, batch.by_loop(lambda i, t, row: 0.37 * sum(j > t for j in row)))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@quick
@given(batch=batches())
def test_prl_equals_grpo_without_a_difference_or_a_weight(divergence: str, batch: Batch) -> None:
    grpo = outcome_advantages(batch.rewards, batch.group_size)
    agree = torch.where(batch.mask, 0.0, torch.nan)
    for log_ratios, beta in ((agree, 5.0), (batch.log_ratios, 0.0)):
        got = prl_advantages(grpo, log_ratios, batch.mask, beta, divergence)
        assert torch.equal(got, per_token(grpo, batch.mask, "grpo"))


def test_a_group_without_outcome_signal_keeps_its_process_term() -> None:
    delta, mask = torch.tensor([[1.0, 2.0], [0.5, 0.0]]), torch.ones(2, 2)
    silent = outcome_advantages(torch.ones(2), group_size=2)
    got = prl_advantages(silent, delta, mask, 0.1)
    torch.testing.assert_close(got, torch.tensor([[-0.3, -0.2], [-0.05, 0.0]]))


def _prl(divergence: str) -> Callable[[Batch], Tensor]:
    return lambda b: prl_advantages(
        b.rewards, b.log_ratios, b.mask, 0.3, divergence, fixed_length_steps(b.mask, 2)
    )


FUNCTIONS: dict[str, Callable[[Batch], Tensor]] = {
    **{name: _prl(name) for name in DIVERGENCES},
    "process_rewards": lambda b: process_rewards(b.rewards, b.log_ratios, b.mask, 0.3),
    "process_baseline": lambda b: process_baseline(b.mask, torch.tensor(0.4)),
}


@pytest.mark.parametrize("function", FUNCTIONS)
@quick
@given(batch=batches(), left=st.integers(0, 3), right=st.integers(0, 3))
def test_padding_and_row_order_change_nothing(
    function: str, batch: Batch, left: int, right: int
) -> None:
    order = torch.randperm(len(batch.mask), generator=torch.Generator().manual_seed(batch.seed))

    def other(values: Tensor, fill: float) -> Tensor:
        return torch.nn.functional.pad(values[order], (left, right), value=fill)

    changed = Batch(
        other(batch.mask.int(), 0).bool(), other(batch.log_ratios, torch.inf), batch.rewards[order]
    )
    assert_close(FUNCTIONS[function](changed), other(FUNCTIONS[function](batch), 0.0))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_results_are_detached(function: str) -> None:
    delta, rewards = (torch.ones(shape, requires_grad=True) for shape in ((2, 3), (2,)))
    assert not FUNCTIONS[function](Batch(torch.ones(2, 3).bool(), delta, rewards)).requires_grad


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_extreme_log_ratios_stay_finite(divergence: str, dtype: torch.dtype) -> None:
    """A policy of 1e-30 on a token is δ = -69 and u = 1e30; and far beyond it."""
    extremes = torch.tensor([-69.0, 69.0, -1e4, 1e4, -1e4, -1e4], dtype=dtype)
    delta = extremes.repeat(2, 1000)
    got = process_term(delta, torch.ones_like(delta), divergence)
    assert got.square().sum().isfinite()
    assert got.to(torch.bfloat16).isfinite().all()


def test_long_sums_of_bfloat16_are_exact() -> None:
    """Summed in bfloat16, 4096 ones stop at 256."""
    delta = torch.ones(1, 4096, dtype=torch.bfloat16)
    assert process_term(delta, torch.ones(1, 4096))[0, 0] == 4096


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_nan_on_a_completion_token_is_not_hidden(divergence: str) -> None:
    got = process_term(torch.tensor([[0.1, torch.nan, 0.2]]), torch.ones(1, 3), divergence)
    assert got.isnan().tolist() == [[True, True, False]]


def test_errors() -> None:
    delta, mask = torch.zeros(2, 3), torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"outcome_advantages has shape \(3,\)"):
        prl_advantages(torch.zeros(3), delta, mask, 0.1)
    with pytest.raises(ValueError, match=r"log_ratios has shape \(2, 3\).*\(2, 2\)"):
        process_term(delta, torch.ones(2, 2))
