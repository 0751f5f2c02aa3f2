import math

import pytest
import torch
from torch import Tensor

from prl_lightning.functional import (
    MAX_LOG_RATIO,
    Divergence,
    divergence_names,
    divergences,
    get_divergence,
    process_term,
    register_divergence,
)

PAPER = {
    "reverse_kl": (lambda u: -u.log(), lambda u: -1 / u),
    "reverse_k3": (lambda u: -u.log() + u - 1, lambda u: 1 - 1 / u),
    "forward_kl": (lambda u: u.log(), lambda u: 1 / u),
    "forward_k3": (lambda u: u * u.log() - u + 1, lambda u: u.log()),
}


@pytest.fixture(autouse=True)
def _forget_registrations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergences, "_divergences", dict(divergences._divergences))


def grid() -> Tensor:
    return torch.arange(-120, 121, dtype=torch.float64) / 20  # holds 0 exactly


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_are_the_general_formula_up_to_a_constant(name: str) -> None:
    """An action-independent constant in reg_t multiplies E ∇ log π = 0."""
    named, general = get_divergence(name), Divergence.from_generator(*PAPER[name])
    torch.testing.assert_close(named.future(grid()), general.future(grid()), rtol=1e-9, atol=1e-12)
    constant = general.own(grid()) - named.own(grid())
    want = {"reverse_kl": 1.0, "forward_kl": -1.0}.get(name, 0.0)
    torch.testing.assert_close(constant, torch.full_like(grid(), want), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", PAPER)
def test_f_prime_is_the_derivative_of_f(name: str) -> None:
    """Of the pairs this file trusts."""
    u = torch.linspace(0.1, 5, 50, dtype=torch.float64, requires_grad=True)
    f, f_prime = PAPER[name]
    (slope,) = torch.autograd.grad(f(u).sum(), u)
    torch.testing.assert_close(f_prime(u).detach(), slope)


@pytest.mark.parametrize("name", ["reverse_k3", "forward_k3"])
def test_k3_terms_are_never_negative_and_zero_only_at_agreement(name: str) -> None:
    values = get_divergence(name).future(grid())
    assert values.min() == 0
    assert grid()[values.argmin()] == 0
    assert (values[grid().abs() > 0.01] > 0).all()


def test_k3_of_nearly_equal_policies_does_not_cancel() -> None:
    """exp(-δ) - 1 + δ = δ²/2 for small δ; in float32, written naively, it is rounding noise."""
    delta = torch.tensor([1e-3, -1e-3])
    want = (delta.double() ** 2 / 2).float()
    torch.testing.assert_close(
        get_divergence("reverse_k3").future(delta), want, rtol=1e-3, atol=1e-10
    )


E = math.exp
EXTREMES = {
    # δ and, by hand, f(u) and f(u) - f'(u)·u + constant; what is exponentiated is kept within ±20.
    "reverse_kl": {15: (15, 15), -25: (-25, -25), 100: (100, 100), -100: (-100, -100)},
    "reverse_k3": {
        -15: (E(15) - 16, -15),
        -25: (E(20) - 26, -25),
        100: (99 + E(-20), 100),
        -100: (E(20) - 101, -100),
    },
    "forward_kl": {15: (-15, -15), -25: (25, 25), 100: (-100, -100), -100: (100, 100)},
    "forward_k3": {
        -15: (15 * E(15) - E(15) + 1, 1 - E(15)),
        -25: (20 * E(20) - E(20) + 1, 1 - E(20)),
        100: (1 - 21 * E(-20), 1 - E(-20)),
    },
}


@pytest.mark.parametrize("name", EXTREMES)
def test_a_log_ratio_is_bounded_where_it_is_exponentiated_and_only_there(name: str) -> None:
    divergence = get_divergence(name)
    for value, (future, own) in EXTREMES[name].items():
        delta = torch.tensor(float(value), dtype=torch.float64)
        assert divergence.future(delta).item() == pytest.approx(future, rel=1e-12)
        assert divergence.own(delta).item() == pytest.approx(own, rel=1e-12)


def test_a_registered_generator_is_found_by_name_and_as_an_object() -> None:
    def f(u: Tensor) -> Tensor:
        return (u - 1) ** 2

    def f_prime(u: Tensor) -> Tensor:
        return 2 * (u - 1)

    register_divergence("squared", f, f_prime)
    assert "squared" in divergence_names()
    delta, mask = torch.tensor([[0.3, -0.2]], dtype=torch.float64), torch.ones(1, 2)
    u = (-delta).exp()
    want = [
        f(u)[0, 0] + f(u)[0, 1] - f_prime(u)[0, 0] * u[0, 0],
        f(u)[0, 1] - f_prime(u)[0, 1] * u[0, 1],
    ]
    got = process_term(delta, mask, "squared")
    torch.testing.assert_close(got, torch.stack(want)[None])
    by_object = process_term(delta, mask, Divergence.from_generator(f, f_prime))
    assert torch.equal(got, by_object)


def test_registering_again_replaces() -> None:
    register_divergence("mine", lambda u: u, lambda u: torch.ones_like(u))
    register_divergence("mine", lambda u: 3 * u, lambda u: torch.full_like(u, 3))
    assert get_divergence("mine").future(torch.zeros(1)) == 3


def test_a_generator_never_sees_zero_or_inf() -> None:
    seen: list[Tensor] = []

    def f(u: Tensor) -> Tensor:
        seen.append(u)
        return u.log()

    Divergence.from_generator(f, lambda u: 1 / u).future(torch.tensor([1e4, -1e4, torch.inf]))
    bound = torch.tensor(MAX_LOG_RATIO).exp()
    torch.testing.assert_close(seen[0], torch.stack([1 / bound, bound, 1 / bound]))


def test_errors_name_the_field_the_value_and_the_mend() -> None:
    with pytest.raises(ValueError, match="divergence is 'k9'.*reverse_kl.*register_divergence"):
        get_divergence("k9")
    with pytest.raises(ValueError, match="name is 'reverse_kl'.*choose another"):
        register_divergence("reverse_kl", lambda u: u, lambda u: u)
