"""Names: built-in ones are protected, users' ones may be replaced, unknown ones are listed."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from prl_lightning.functional import (
    get_divergence,
    outcome_advantages,
    policy_loss,
    register_advantage,
    register_divergence,
    register_loss,
)
from prl_lightning.functional.advantages import ADVANTAGES
from prl_lightning.functional.divergences import DIVERGENCES
from prl_lightning.functional.losses import LOSSES

X = torch.full((1, 1), 3.0)
Call = Callable[..., Any]
CASES: dict[str, tuple[str, Call, Call, Call]] = {
    # a built-in name; register(name, factor) and what then computes factor * 3
    "divergence": (
        "reverse_kl",
        lambda name, factor: register_divergence(name, lambda u: factor * 3 * u, lambda u: 0 * u),
        lambda name: get_divergence(name).future(0 * X),
        lambda: DIVERGENCES,
    ),
    "kind": (
        "grpo",
        lambda name, factor: register_advantage(name, lambda r, members, unbiased: factor * r),
        lambda name: outcome_advantages(X[0], 1, name),
        lambda: ADVANTAGES,
    ),
    "surrogate": (
        "clip",
        lambda name, factor: register_loss(
            name, lambda ratio, a, low, high: (factor * a * ratio, a > 9)
        ),
        lambda name: policy_loss(0 * X, 0 * X, X[0], X, surrogate=name)[0],
        lambda: LOSSES,
    ),
}


@pytest.fixture(autouse=True)
def _forget_registrations() -> Iterator[None]:
    yield
    for registry in (DIVERGENCES, ADVANTAGES, LOSSES):
        registry._registered.clear()


@pytest.mark.parametrize("field", CASES)
def test_a_registered_function_is_used_and_may_be_replaced(field: str) -> None:
    built_in, register, compute, registry = CASES[field]
    for factor in (1, 2):
        register("mine", factor)
        assert compute("mine").item() == 3 * factor
    assert registry().names()[0] == built_in
    assert registry().names()[-1] == "mine"


@pytest.mark.parametrize("field", CASES)
def test_built_in_names_are_protected_and_unknown_ones_are_errors(field: str) -> None:
    built_in, register, compute, _ = CASES[field]
    register("mine", 1)
    with pytest.raises(ValueError, match=f"name='{built_in}'"):
        register(built_in, 1)
    with pytest.raises(ValueError, match=f"{field}='other': .*{built_in}.*mine.*register_"):
        compute("other")
