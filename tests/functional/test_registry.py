import pytest
import torch

from prl_lightning.functional import Divergence, process_term, register_divergence
from prl_lightning.functional.divergences import DIVERGENCES
from prl_lightning.functional.registry import Registry


def test_names_of_users_may_be_replaced_and_built_in_ones_may_not() -> None:
    registry = Registry("colour", {"red": 1}, "register_colour(name, value)")
    for value in (2, 3):
        registry.register("mine", value)
        assert (registry["red"], registry["mine"]) == (1, value)
    assert registry.names() == ["red", "mine"]
    with pytest.raises(ValueError, match="name='red'"):
        registry.register("red", 2)
    with pytest.raises(ValueError, match=r"colour='blue': .*red, mine.*register_colour\(name"):
        registry["blue"]
    assert registry.error("mine") is None
    assert str(registry.error("blue", "model.colour")).startswith("model.colour='blue': ")


def test_a_registered_divergence_is_found_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DIVERGENCES, "_registered", {})
    generator = (lambda u: (u - 1) ** 2, lambda u: 2 * (u - 1))
    register_divergence("mine", *generator)
    delta, mask = torch.tensor([[0.3, -0.2]]), torch.ones(1, 2)
    by_object = process_term(delta, mask, Divergence.from_generator(*generator))
    assert torch.equal(process_term(delta, mask, "mine"), by_object)
