import math

import pytest
import torch
from torch import Tensor

from prl_lightning.functional import MAX_LOG_RATIO, Divergence, get_divergence, process_term
from prl_lightning.functional.divergences import DIVERGENCES

PAPER = {
    "reverse_kl": (lambda u: -u.log(), lambda u: -1 / u),
    "reverse_k3": (lambda u: -u.log() + u - 1, lambda u: 1 - 1 / u),
    "forward_kl": (lambda u: u.log(), lambda u: 1 / u),
    "forward_k3": (lambda u: u * u.log() - u + 1, lambda u: u.log()),
}
GRID = torch.arange(-120, 121, dtype=torch.float64) / 20  # holds 0 exactly


@pytest.mark.parametrize("name", DIVERGENCES._built_in)
def test_the_papers_are_the_general_formula_up_to_a_constant(name: str) -> None:
    """An action-independent constant in reg_t multiplies E ∇ log π = 0."""
    named, general = get_divergence(name), Divergence.from_generator(*PAPER[name])
    torch.testing.assert_close(named.future(GRID), general.future(GRID), rtol=1e-9, atol=1e-12)
    want = {"reverse_kl": 1.0, "forward_kl": -1.0}.get(name, 0.0)
    constant = general.own(GRID) - named.own(GRID)
    torch.testing.assert_close(constant, torch.full_like(GRID, want), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", PAPER)
def test_f_prime_is_the_derivative_of_f(name: str) -> None:
    """Of the pairs this file trusts."""
    u = torch.linspace(0.1, 5, 50, dtype=torch.float64, requires_grad=True)
    f, f_prime = PAPER[name]
    (slope,) = torch.autograd.grad(f(u).sum(), u)
    torch.testing.assert_close(f_prime(u).detach(), slope)


@pytest.mark.parametrize("name", ["reverse_k3", "forward_k3"])
def test_k3_terms_are_never_negative_and_zero_only_at_agreement(name: str) -> None:
    assert torch.equal(get_divergence(name).future(GRID) > 0, GRID != 0)
    assert get_divergence(name).future(torch.zeros(1)) == 0


def test_k3_of_nearly_equal_policies_does_not_cancel() -> None:
    """exp(-δ) - 1 + δ = δ²/2 for small δ; in float32, written naively, it is rounding noise."""
    found = get_divergence("reverse_k3").future(torch.tensor([1e-3, -1e-3]))
    torch.testing.assert_close(found, torch.full((2,), 5e-7), rtol=1e-3, atol=1e-10)


E = math.exp


@pytest.mark.parametrize(
    ("name", "delta", "future", "own"),
    [
        # f(u) and f(u) - f'(u)·u + constant by hand; what is exponentiated is kept within ±20.
        ("reverse_kl", 15, 15, 15),
        ("reverse_kl", -100, -100, -100),
        ("reverse_k3", -15, E(15) - 16, -15),
        ("reverse_k3", -25, E(20) - 26, -25),
        ("reverse_k3", 100, 99 + E(-20), 100),
        ("forward_kl", 15, -15, -15),
        ("forward_kl", -100, 100, 100),
        ("forward_k3", -15, 15 * E(15) - E(15) + 1, 1 - E(15)),
        ("forward_k3", -25, 20 * E(20) - E(20) + 1, 1 - E(20)),
        ("forward_k3", 100, 1 - 21 * E(-20), 1 - E(-20)),
    ],
)
def test_a_log_ratio_is_bounded_where_it_is_exponentiated_and_only_there(
    name: str, delta: float, future: float, own: float
) -> None:
    divergence, at = get_divergence(name), torch.tensor(float(delta), dtype=torch.float64)
    found = (divergence.future(at).item(), divergence.own(at).item())
    assert found == pytest.approx((future, own), rel=1e-12)


def test_a_generator_is_used_as_an_object() -> None:
    """f = (u - 1)²: f(u_2) + f(u_1) - f'(u_1)·u_1 = (u_2 - 1)² + 1 - u_1², then 1 - u_2²."""
    divergence = Divergence.from_generator(lambda u: (u - 1) ** 2, lambda u: 2 * (u - 1))
    log_ratios = -torch.tensor([[2.0, 3.0]], dtype=torch.float64).log()
    got = process_term(log_ratios, torch.ones(1, 2), divergence)
    torch.testing.assert_close(got, torch.tensor([[4.0 - 3, -8.0]], dtype=torch.float64))


def test_a_generator_never_sees_zero_or_inf() -> None:
    seen: list[Tensor] = []

    def f(u: Tensor) -> Tensor:
        seen.append(u)
        return u.log()

    Divergence.from_generator(f, lambda u: 1 / u).future(torch.tensor([1e4, -1e4, torch.inf]))
    bound = torch.tensor(MAX_LOG_RATIO).exp()
    torch.testing.assert_close(seen[0], torch.stack([1 / bound, bound, 1 / bound]))
