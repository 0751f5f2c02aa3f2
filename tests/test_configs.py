"""Every shipped configuration runs through the command line."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from prl_lightning.objective import Objective
from prl_lightning.references import Reference
from prl_lightning.runs.files import read_metrics
from tiny_runs import fit, metrics_of, tiny_overrides
from trainer_runs import TRAIN_ALONE

pytestmark = pytest.mark.process

CONFIGS = Path(__file__).parents[1] / "configs"
METHODS = sorted((CONFIGS / "methods").glob("*.yaml"))


def objective_of(config: Path) -> dict[str, Any]:
    settings: dict[str, Any] = yaml.safe_load(config.read_text())["model"]["objective"]
    return settings


# METHOD's table of what is compared, one row a file; what is not named is the default.
TABLE = {
    "grpo": Objective(outcome="grpo", kl="none"),
    "grpo-kl-loss": Objective(outcome="grpo", kl="loss", kl_estimator="k3", beta=0.01),
    "grpo-kl-reward-trajectory": Objective(outcome="grpo", kl="reward_trajectory", beta=0.01),
    "grpo-kl-reward-step": Objective(outcome="grpo", kl="reward_step", beta=0.01),
    "raft": Objective(outcome="raft", kl="none"),
    "maxrl": Objective(outcome="maxrl", kl="none"),
    "batch-std": Objective(outcome="batch_std", kl="none"),
    "gdpo": Objective(outcome="batch_std", decouple_rewards=True, kl="none"),
    "gspo": Objective(
        kl="none",
        surrogate="gspo",
        clip_low=3e-4,
        clip_high=4e-4,
        aggregation="sequence_mean",
    ),
    "cispo": Objective(kl="none", surrogate="cispo", clip_low=1.0, clip_high=4.0),
    "dual-clip": Objective(kl="none", surrogate="dual_clip"),
    "prl": Objective(outcome="grpo", kl="process", beta=0.01, steps=256),
    "prl-newline": Objective(outcome="grpo", kl="process", beta=0.01, steps="newline"),
    "frpo": Objective(outcome="grpo", kl="process", beta=0.01, divergence="reverse_kl"),
    "frpo-k3": Objective(outcome="grpo", kl="process", beta=0.01, divergence="reverse_k3"),
}


def test_methods_are_the_papers() -> None:
    assert {file.stem: Objective(**objective_of(file)) for file in METHODS} == TABLE


@pytest.mark.parametrize("below", [CONFIGS / "paper" / "v1.yaml", *METHODS], ids=lambda f: f.stem)
@pytest.mark.parametrize("method", METHODS, ids=lambda file: file.stem)
def test_a_method_goes_over_any_configuration(method: Path, below: Path) -> None:
    own = objective_of(method)
    objective, alone = Objective(**(objective_of(below) | own)), Objective(**own)
    fields = ["outcome", "kl", "steps"] + ["divergence"] * (alone.kl == "process")
    fields += ["surrogate"] * ("surrogate" in own)
    fields += ["decouple_rewards"] * ("decouple_rewards" in own)
    assert [getattr(objective, name) for name in fields] == [getattr(alone, f) for f in fields]


@pytest.mark.parametrize("method", METHODS, ids=lambda file: file.stem)
def test_method_trains(method: Path, tied_model: str, tmp_path: Path) -> None:
    overrides = tiny_overrides(tied_model, tmp_path)
    fit("--config", str(method), *overrides)
    metrics = metrics_of(tmp_path)
    assert len(metrics["train/loss"]) == 2
    assert all(math.isfinite(value) for values in metrics.values() for value in values)
    assert max(metrics["train/grad_norm"]) > 0
    # Only what the objective needs is loaded: without a KL there is no drift to report.
    has_reference = TABLE[method.stem].kl != "none"
    assert ("train/kl_ref" in metrics) == has_reference
    assert ("train/process_term_mean" in metrics) == (method.stem.startswith(("prl", "frpo")))
    assert "val/tiny/mean@4" in metrics
    assert "val/tiny/pass@2" in metrics

    checkpoint = torch.load(
        tmp_path / "run" / "version_0" / "checkpoints" / "last.ckpt", weights_only=True
    )
    state = checkpoint["state_dict"]
    assert not any(name.startswith("reference") for name in state)
    start = AutoModelForCausalLM.from_pretrained(tied_model).state_dict()
    moved = [not torch.equal(state[f"policy.causal_lm.{name}"], start[name]) for name in start]
    assert all(moved)


@pytest.mark.parametrize(
    ("name", "references", "learns_rewards"),
    [
        ("distill", {"teacher": Reference(beta=1.0, discount=0.0)}, False),
        ("distill-and-reward", {"start": Reference(), "teacher": Reference(beta=0.1)}, True),
        ("max-entropy", {"uniform": Reference(kind="uniform", beta=0.001)}, True),
        ("moving-reference", {"before": Reference(kind="moving", every=10)}, True),
    ],
)
def test_references_train(
    name: str,
    references: dict[str, Reference],
    learns_rewards: bool,
    tied_model: str,
    tmp_path: Path,
) -> None:
    file = CONFIGS / "references" / f"{name}.yaml"
    own = objective_of(file)
    named = {key: Reference(**settings) for key, settings in own.pop("references").items()}
    assert named == references
    assert own == {"outcome": "grpo" if learns_rewards else "none"}
    fit("--config", str(file), *tiny_overrides(tied_model, tmp_path))
    metrics = metrics_of(tmp_path)
    assert all(math.isfinite(value) for values in metrics.values() for value in values)
    # Without rewards the policy is its own teacher at first, and learns nothing.
    assert (metrics["train/grad_norm"][0] > 1e-4) == learns_rewards
    assert ("train/kl_ref/teacher" in metrics) == (len(references) > 1)
    assert "train/process_term_mean" in metrics


def test_refilling_goes_over_a_method(tied_model: str, tmp_path: Path) -> None:
    config = CONFIGS / "rollout" / "refill.yaml"
    overrides = tiny_overrides(tied_model, tmp_path)
    fit("--config", str(CONFIGS / "methods" / "grpo.yaml"), "--config", str(config), *overrides)
    metrics = metrics_of(tmp_path)
    names = ("rollout/refill_attempts", "rollout/refill_discarded")
    for attempts, discarded in zip(*(metrics[name] for name in names), strict=True):
        assert 1 <= attempts <= 4
        # Four are kept of all that were sampled, and each prompt that was needed was.
        assert 4 / (1 - discarded) > 4 * attempts - 1e-3
    assert "rollout/solved_prompts" in metrics
    assert "train/kl_ref" not in metrics


@pytest.mark.example
@pytest.mark.parametrize(
    "file", sorted((CONFIGS / "environments").glob("*.yaml")), ids=lambda file: file.stem
)
def test_an_environment_is_acted_in(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is, but for sizes; the base model has learnt nothing, and calls by chance."""
    monkeypatch.chdir(tmp_path)  # the files name folders within the current one
    task = {"hidden_size": 32, "layers": 1, "base_steps": 1}
    fit(
        f"--config={file}",
        *(f"--data.prepare.init_args.{name}={value}" for name, value in task.items()),
        "--data.prompts_per_epoch=8",
        "--rollout.sampler=HFSampler",
        "--trainer.max_epochs=1",
        *TRAIN_ALONE,
    )
    (curves,) = (tmp_path / "runs").glob("*/version_0/metrics.csv")
    values = {name: numbers for name, (_, numbers) in read_metrics(curves).items()}
    assert values["rollout/calls"][-1] > 0.1
    assert values["rollout/turns"][-1] > 1.1
    assert values["rollout/environment_failures"] == [0.0]
