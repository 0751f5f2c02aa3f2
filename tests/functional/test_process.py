import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from prl_lightning.functional import (
    Divergence,
    divergence_names,
    fixed_length_steps,
    outcome_advantages,
    prl_advantages,
    process_baseline,
    process_rewards,
    process_term,
)
from prl_lightning.functional.process import per_token

from .batches import Batch, batches, quick

PAPER = ["reverse_kl", "reverse_k3", "forward_kl", "forward_k3"]


def slow_process_term(batch: Batch, divergence: str) -> Tensor:
    """METHOD's table, token by token, in plain floats."""
    reg = torch.zeros(batch.mask.shape, dtype=torch.float64)
    for i, positions in enumerate(batch.rows()):
        delta = {t: batch.log_ratios[i, t].item() for t in positions}
        for t in positions:
            later = [delta[j] for j in positions if j > t]
            reg[i, t] = {
                "reverse_kl": delta[t] + sum(later),
                "reverse_k3": delta[t] + sum(d + math.exp(-d) - 1 for d in later),
                "forward_kl": -delta[t] - sum(later),
                "forward_k3": 1
                - math.exp(-delta[t])
                + sum(math.exp(-d) * -d - math.exp(-d) + 1 for d in later),
            }[divergence]
    return reg


@pytest.mark.parametrize("divergence", PAPER)
@quick
@given(batch=batches())
def test_process_term_is_a_loop(divergence: str, batch: Batch) -> None:
    got = process_term(batch.log_ratios, batch.mask, divergence)
    torch.testing.assert_close(got, slow_process_term(batch, divergence), rtol=1e-12, atol=1e-12)


def test_padding_costs_nothing_whatever_agreement_costs() -> None:
    """The papers' generators are 0 at u = 1, where the padding is; this one is 1."""
    generator = Divergence.from_generator(lambda u: u, torch.ones_like)
    got = process_term(torch.zeros(1, 3), torch.tensor([[1, 1, 0]]), generator)
    assert got.tolist() == [[1.0, 0.0, 0.0]]


def test_process_term_by_hand() -> None:
    delta, mask = torch.tensor([[math.log(2), -math.log(2), 0.0]]), torch.tensor([[1, 1, 0]])
    log2 = math.log(2)
    for divergence, want in {
        "reverse_kl": [0.0, -log2],
        "reverse_k3": [log2 + (-log2 + 2 - 1), -log2],
        "forward_kl": [0.0, log2],
        "forward_k3": [1 - 0.5 + (2 * log2 - 2 + 1), 1 - 2.0],
    }.items():
        got = process_term(delta, mask, divergence)
        torch.testing.assert_close(got, torch.tensor([[*want, 0.0]]))


@pytest.mark.parametrize("divergence", PAPER)
@quick
@given(batch=batches(), length=st.integers(1, 4))
def test_steps_carry_the_value_at_their_end(divergence: str, batch: Batch, length: int) -> None:
    token = slow_process_term(batch, divergence)
    want = torch.zeros_like(token)
    for i, positions in enumerate(batch.rows()):
        for start in range(0, len(positions), length):
            step = positions[start : start + length]
            want[i, step] = token[i, step[-1]]
    ends = fixed_length_steps(batch.mask, length)
    got = process_term(batch.log_ratios, batch.mask, divergence, ends)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("divergence", PAPER)
@quick
@given(batch=batches())
def test_token_form_is_steps_of_length_one(divergence: str, batch: Batch) -> None:
    ends = fixed_length_steps(batch.mask, 1)
    assert torch.equal(
        process_term(batch.log_ratios, batch.mask, divergence, ends),
        process_term(batch.log_ratios, batch.mask, divergence),
    )


@quick
@given(batch=batches())
def test_the_last_token_ends_a_step_even_unsaid(batch: Batch) -> None:
    unsaid = torch.zeros_like(batch.mask)
    said = fixed_length_steps(batch.mask, 100)
    assert torch.equal(
        process_term(batch.log_ratios, batch.mask, step_ends=unsaid),
        process_term(batch.log_ratios, batch.mask, step_ends=said),
    )


@quick
@given(batch=batches())
def test_one_step_over_the_whole_completion_has_the_value_at_its_end(batch: Batch) -> None:
    """v1's rule e = last token: δ of the last token alone, for every token."""
    got = process_term(
        batch.log_ratios, batch.mask, step_ends=fixed_length_steps(batch.mask, 10**6)
    )
    for i, positions in enumerate(batch.rows()):
        for t in positions:
            assert got[i, t] == batch.log_ratios[i, positions[-1]]


@quick
@given(batch=batches())
def test_first_token_carries_the_trajectory_kl(batch: Batch) -> None:
    got = process_term(batch.log_ratios, batch.mask)
    for i, positions in enumerate(batch.rows()):
        if positions:
            want = batch.log_ratios[i, positions].sum().item()
            assert got[i, positions[0]].item() == pytest.approx(want, abs=1e-12)


@quick
@given(batch=batches(), beta=st.floats(0, 2))
def test_prl_advantages_is_its_equation(batch: Batch, beta: float) -> None:
    got = prl_advantages(batch.rewards, batch.log_ratios, batch.mask, beta, "forward_k3")
    reg = slow_process_term(batch, "forward_k3")
    for i, positions in enumerate(batch.rows()):
        for t in range(batch.mask.shape[1]):
            want = (batch.rewards[i] - beta * reg[i, t]).item() if t in positions else 0.0
            assert got[i, t].item() == pytest.approx(want, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("divergence", PAPER)
@quick
@given(batch=batches())
def test_prl_equals_grpo_when_policy_is_reference(divergence: str, batch: Batch) -> None:
    grpo = outcome_advantages(batch.rewards, batch.group_size)
    agree = torch.where(batch.mask, 0.0, torch.nan)
    got = prl_advantages(grpo, agree, batch.mask, 5.0, divergence)
    assert torch.equal(got, per_token(grpo, batch.mask, "grpo").to(got.dtype))


@pytest.mark.parametrize("divergence", PAPER)
@quick
@given(batch=batches())
def test_prl_equals_grpo_when_beta_is_zero(divergence: str, batch: Batch) -> None:
    grpo = outcome_advantages(batch.rewards, batch.group_size)
    got = prl_advantages(grpo, batch.log_ratios, batch.mask, 0.0, divergence)
    assert torch.equal(got, per_token(grpo, batch.mask, "grpo"))


def test_a_group_without_outcome_signal_keeps_its_process_term() -> None:
    delta, mask = torch.tensor([[1.0, 2.0], [0.5, 0.0]]), torch.ones(2, 2)
    silent = outcome_advantages(torch.ones(2), group_size=2)
    got = prl_advantages(silent, delta, mask, 0.1)
    torch.testing.assert_close(got, torch.tensor([[-0.3, -0.2], [-0.05, 0.0]]))


@quick
@given(batch=batches())
def test_outcome_advantages_may_differ_between_tokens(batch: Batch) -> None:
    baseline = process_baseline(batch.mask, torch.tensor(0.4, dtype=torch.float64))
    outcome = batch.rewards[:, None] + 0.5 * baseline
    got = prl_advantages(outcome, batch.log_ratios, batch.mask, 0.5, "reverse_k3")
    reg = process_term(batch.log_ratios, batch.mask, "reverse_k3")
    want = per_token(batch.rewards, batch.mask, "rewards") - 0.5 * (reg - baseline)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


FUNCTIONS: dict[str, Callable[[Batch], Tensor]] = {
    **{
        f"prl_advantages, {name}": lambda b, name=name: prl_advantages(
            b.rewards, b.log_ratios, b.mask, 0.3, name
        )
        for name in PAPER
    },
    "prl_advantages, steps": lambda b: prl_advantages(
        b.rewards, b.log_ratios, b.mask, 0.3, "reverse_k3", fixed_length_steps(b.mask, 2)
    ),
    "process_rewards": lambda b: process_rewards(b.rewards, b.log_ratios, b.mask, 0.3),
    "process_baseline": lambda b: process_baseline(b.mask, torch.tensor(0.4)),
}


@pytest.mark.parametrize("function", FUNCTIONS)
@quick
@given(batch=batches(), left=st.integers(0, 3), right=st.integers(0, 3))
def test_padding_changes_nothing(function: str, batch: Batch, left: int, right: int) -> None:
    def pad(values: Tensor, fill: float) -> Tensor:
        return torch.nn.functional.pad(values, (left, right), value=fill)

    padded = Batch(
        pad(batch.mask.int(), 0).bool(), pad(batch.log_ratios, torch.inf), batch.rewards, 1, 0
    )
    want = pad(FUNCTIONS[function](batch), 0.0)
    torch.testing.assert_close(FUNCTIONS[function](padded), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("function", FUNCTIONS)
@quick
@given(batch=batches())
def test_row_order_changes_nothing(function: str, batch: Batch) -> None:
    order = torch.randperm(len(batch.mask), generator=torch.Generator().manual_seed(batch.seed))
    shuffled = Batch(
        batch.mask[order], batch.log_ratios[order], batch.rewards[order], 1, batch.seed
    )
    want = FUNCTIONS[function](batch)[order]
    torch.testing.assert_close(FUNCTIONS[function](shuffled), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_no_rows_or_no_tokens(function: str, shape: tuple[int, int]) -> None:
    empty = torch.zeros(shape)
    batch = Batch(empty.bool(), empty, torch.zeros(shape[0]), 1, 0)
    assert FUNCTIONS[function](batch).shape == shape


@pytest.mark.parametrize("function", FUNCTIONS)
def test_results_are_detached(function: str) -> None:
    delta = torch.randn(2, 3, requires_grad=True)
    batch = Batch(torch.ones(2, 3).bool(), delta, torch.randn(2, requires_grad=True), 1, 0)
    assert not FUNCTIONS[function](batch).requires_grad


@pytest.mark.parametrize("divergence", PAPER)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_extreme_log_ratios_stay_finite(divergence: str, dtype: torch.dtype) -> None:
    """A policy of 1e-30 on a token is δ = -69 and u = 1e30; and far beyond it."""
    extremes = torch.tensor([-69.0, 69.0, -1e4, 1e4, -1e4, -1e4], dtype=dtype)
    delta = extremes.repeat(2, 1000)
    got = process_term(delta, torch.ones_like(delta), divergence)
    assert got.isfinite().all()
    assert got.square().sum().isfinite()
    assert got.to(torch.bfloat16).isfinite().all()


def test_long_sums_of_bfloat16_are_exact() -> None:
    """Summed in bfloat16, 4096 ones stop at 256."""
    delta = torch.ones(1, 4096, dtype=torch.bfloat16)
    assert process_term(delta, torch.ones(1, 4096))[0, 0] == 4096


@pytest.mark.parametrize("divergence", PAPER)
def test_a_nan_on_a_completion_token_is_not_hidden(divergence: str) -> None:
    delta = torch.tensor([[0.1, torch.nan, 0.2]])
    got = process_term(delta, torch.ones(1, 3), divergence)
    assert got.isnan().tolist() == [[True, True, False]]


@quick
@given(batch=batches(), beta=st.floats(0, 2))
def test_process_rewards_is_its_equation(batch: Batch, beta: float) -> None:
    got = process_rewards(batch.rewards, batch.log_ratios, batch.mask, beta)
    for i, positions in enumerate(batch.rows()):
        for t in range(batch.mask.shape[1]):
            later = sum(batch.log_ratios[i, j].item() for j in positions if j > t)
            want = batch.rewards[i].item() - beta * later if t in positions else 0.0
            assert got[i, t].item() == pytest.approx(want, rel=1e-12, abs=1e-12)


@quick
@given(batch=batches())
def test_process_rewards_of_consecutive_prefixes_differ_by_beta_delta(batch: Batch) -> None:
    got = process_rewards(batch.rewards, batch.log_ratios, batch.mask, 0.7)
    for i, positions in enumerate(batch.rows()):
        if positions:
            assert got[i, positions[-1]] == batch.rewards[i]
        for before, t in zip(positions, positions[1:], strict=False):
            step = (got[i, t] - got[i, before]).item()
            assert step == pytest.approx(0.7 * batch.log_ratios[i, t].item(), abs=1e-12)


@quick
@given(batch=batches())
def test_process_baseline_is_its_equation(batch: Batch) -> None:
    mean = 0.37
    got = process_baseline(batch.mask, torch.tensor(mean, dtype=torch.float64))
    for i, positions in enumerate(batch.rows()):
        for t in range(batch.mask.shape[1]):
            want = mean * sum(j > t for j in positions) if t in positions else 0.0
            assert got[i, t].item() == pytest.approx(want, rel=1e-9, abs=1e-12)


def test_every_papers_divergence_is_tested_here() -> None:
    assert divergence_names()[: len(PAPER)] == PAPER


def test_errors_name_the_field_the_value_and_the_mend() -> None:
    delta, mask = torch.zeros(2, 3), torch.ones(2, 3)
    with pytest.raises(
        ValueError, match=r"outcome_advantages has shape \(3,\).*\(B,\) or \(B, T\)"
    ):
        prl_advantages(torch.zeros(3), delta, mask, 0.1)
    with pytest.raises(ValueError, match=r"log_ratios has shape \(2, 3\).*\(2, 2\)"):
        process_term(delta, torch.ones(2, 2))
