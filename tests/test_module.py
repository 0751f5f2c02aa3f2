"""PRLModule: what it loads, logs and saves."""

from __future__ import annotations

import pytest
import torch

from prl_lightning.module import PRLModule
from prl_lightning.objective import Objective


def loaded(model: str, objective: Objective, **options: bool) -> PRLModule:
    module = PRLModule(model, objective, **options)
    module.configure_model()
    return module


@pytest.mark.parametrize(
    ("objective", "track", "has_reference"),
    [
        (Objective(kl="process", beta=0.01), False, True),
        (Objective(kl="loss", beta=0.01), False, True),
        (Objective(kl="reward_step", beta=0.01), False, True),
        (Objective(kl="process", beta=0.0), False, False),
        (Objective(kl="none"), False, False),
        (Objective(kl="none"), True, True),
    ],
)
def test_reference_is_loaded_only_where_it_is_used(
    objective: Objective, track: bool, has_reference: bool, tied_model: str
) -> None:
    module = loaded(tied_model, objective, track_reference=track)
    assert (module.reference is not None) == has_reference
    if module.reference is not None:
        assert not any(p.requires_grad for p in module.reference.parameters())


def test_checkpoint_leaves_the_reference_out_and_loads_strictly(tied_model: str) -> None:
    module = loaded(tied_model, Objective())
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    assert state
    assert all(name.startswith("policy.") for name in state)
    changed = {name: tensor + 1 for name, tensor in state.items()}
    module.load_state_dict(changed, strict=True)
    assert module.policy is not None
    assert module.reference is not None
    for name, tensor in module.reference.state_dict().items():
        assert torch.equal(tensor, state[f"policy.{name}"])
        assert torch.equal(module.policy.state_dict()[name], changed[f"policy.{name}"])


def test_a_missing_policy_weight_is_still_an_error(tied_model: str) -> None:
    module = loaded(tied_model, Objective())
    state = module.state_dict()
    state.pop(next(iter(state)))
    with pytest.raises(RuntimeError, match="Missing key"):
        module.load_state_dict(state, strict=True)


def test_optimizer_gets_the_policy_alone(tied_model: str) -> None:
    module = loaded(tied_model, Objective())
    optimizer = module.configure_optimizers()
    optimised = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert module.policy is not None
    assert optimised == {id(p) for p in module.policy.parameters()}


def test_weights_name_a_tied_head_too(tied_model: str) -> None:
    names = dict(loaded(tied_model, Objective()).weights())
    assert torch.equal(names["lm_head.weight"], names["model.embed_tokens.weight"])


def test_temperature_must_be_positive(tied_model: str) -> None:
    with pytest.raises(ValueError, match="model.temperature=0"):
        PRLModule(tied_model, temperature=0.0)
