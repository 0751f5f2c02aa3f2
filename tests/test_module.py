"""PRLModule: what it loads, logs and saves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from conftest import MakeRollout
from prl_lightning.data import collate
from prl_lightning.models.sharding import total_norm
from prl_lightning.module import PRLModule
from prl_lightning.objective import Objective
from ranks import gap, read, recorded_run
from tiny_runs import fit


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
    assert len(module.references.models) == has_reference
    assert not any(p.requires_grad for p in module.references.parameters())


def test_a_reference_that_is_not_loaded_is_not_replaced_by_the_policy(
    tied_model: str, make_rollout: MakeRollout
) -> None:
    module = loaded(tied_model, Objective(kl="none"))
    batch = collate([make_rollout([3], [4])], 1, 1)
    with pytest.raises(RuntimeError, match=r"model\.track_reference"):
        module.score_references(batch)


def test_checkpoint_leaves_the_reference_out_and_loads_strictly(tied_model: str) -> None:
    module = loaded(tied_model, Objective())
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    assert state
    assert all(name.startswith("policy.") for name in state)
    changed = {name: tensor + 1 for name, tensor in state.items()}
    module.load_state_dict(changed, strict=True)
    assert module.policy is not None
    (reference,) = module.references.models.values()
    for name, tensor in reference.state_dict().items():
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


@pytest.mark.process
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_an_update_is_clipped_by_the_norm_that_is_computed_once(
    tied_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str
) -> None:
    """The guard asks for it, the log, and the clipping; of plain steps of size 1."""
    computed: list[float] = []

    def norm(model: torch.nn.Module) -> Tensor:
        found = total_norm(model)
        computed.append(float(found))
        return found

    monkeypatch.setattr("prl_lightning.module.total_norm", norm)
    fit(
        *recorded_run(tied_model, tmp_path),
        "--model.optimizer={class_path: torch.optim.SGD, init_args: {lr: 1.0}}",
        "--trainer.max_epochs=1",
        "--trainer.check_val_every_n_epoch=1",
        "--trainer.gradient_clip_val=0.5",
        f"--trainer.gradient_clip_algorithm={algorithm}",
    )
    record = read(tmp_path)
    gradient = record["gradient"]
    by_hand = sum(float(g.double().square().sum()) for g in gradient.values()) ** 0.5
    assert computed == [pytest.approx(by_hand, rel=1e-5)]
    assert record["metrics"]["train/grad_norm"] == pytest.approx(by_hand, rel=1e-5)
    assert by_hand > 1
    assert record["gradients_left"] == []
    for name, raw in gradient.items():
        step = record["before"][name] - record["after"][name]
        expected = raw * 0.5 / by_hand if algorithm == "norm" else raw.clamp(-0.5, 0.5)
        torch.testing.assert_close(step, expected, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.process
def test_a_fused_optimizer_is_clipped_under_bf16_mixed(tied_model: str, tmp_path: Path) -> None:
    """Lightning refuses it, for gradients that a scaler has scaled; here there is none."""
    fit(
        *recorded_run(tied_model, tmp_path),
        "--model.optimizer={class_path: torch.optim.AdamW, init_args: {lr: 0.01, fused: true}}",
        "--trainer.precision=bf16-mixed",
        "--trainer.max_epochs=1",
        "--trainer.check_val_every_n_epoch=1",
    )
    record = read(tmp_path)
    assert record["metrics"]["train/grad_norm"] > 1
    assert gap(record["after"], record["before"]) > 1e-3
