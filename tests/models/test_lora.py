"""LoRA: what the engine is sent is what the trainer computes with, and off means off."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prl_lightning.data import collate
from prl_lightning.models.causal_lm import LogprobModel, named_weights
from prl_lightning.models.loading import load_causal_lm, load_policy
from prl_lightning.models.lora import adapters_off
from prl_lightning.types import Completion, Prompt, Rollout, RolloutBatch
from tiny_runs import fit, metrics_of, tiny_overrides

LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}


@pytest.fixture
def batch() -> RolloutBatch:
    completions = [[4, 9, 1], [15, 3, 12, 6, 7]]
    rollouts = [
        Rollout(Prompt([5, 14, 7], ""), Completion(ids, [-1.0] * len(ids), True), "")
        for ids in completions
    ]
    return collate(rollouts, 1, 1)


def adapted(folder: str, **settings: Any) -> LogprobModel:
    """A policy whose adapter does something; peft starts it at zero."""
    policy = load_policy(folder, LORA | settings)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return policy


@torch.no_grad()
def logprobs(model: LogprobModel, batch: RolloutBatch) -> Tensor:
    scores: Tensor = model(batch)[0]
    return scores


@pytest.mark.parametrize(
    "settings", [{}, {"use_rslora": True}, {"target_modules": ["q_proj", "embed_tokens"]}],
    ids=["all-linear", "rslora", "embedding"],
)  # fmt: skip
def test_the_weights_sent_are_those_computed_with(
    untied_model: str, batch: RolloutBatch, settings: dict[str, Any]
) -> None:
    policy = adapted(untied_model, **settings)
    plain = load_causal_lm(untied_model)
    base = logprobs(LogprobModel(plain), batch)
    plain.load_state_dict(dict(named_weights(policy)), strict=True)
    ours = logprobs(policy, batch)
    torch.testing.assert_close(logprobs(LogprobModel(plain), batch), ours, atol=1e-5, rtol=0)
    assert (ours - base).abs().max() > 0.05


def test_with_the_adapter_off_it_is_the_model_underneath(
    tied_model: str, batch: RolloutBatch
) -> None:
    policy = adapted(tied_model)
    on = logprobs(policy, batch)
    trained = [name for name, p in policy.named_parameters() if p.requires_grad]
    with adapters_off(policy):
        off = logprobs(policy, batch)
    assert torch.equal(off, logprobs(LogprobModel(load_causal_lm(tied_model)), batch))
    assert torch.equal(logprobs(policy, batch), on)
    assert trained == [name for name, p in policy.named_parameters() if p.requires_grad]
    assert trained
    assert all(".lora_" in name for name in trained)


def test_every_rank_starts_with_the_same_adapter_and_random_numbers_are_left_alone(
    tied_model: str,
) -> None:
    torch.manual_seed(1)
    first = load_policy(tied_model, LORA).state_dict()
    drawn = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(3), drawn)
    second = load_policy(tied_model, LORA).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 4}, r"model\.lora=.*'rank'"),
        ({"use_dora": True}, r"model\.lora\.use_dora=True: cannot be merged"),
        ({"modules_to_save": ["lm_head"]}, r"model\.lora\.modules_to_save=\['lm_head'\]"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    tied_model: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_policy(tied_model, settings)


def test_without_peft_the_message_says_how_to_get_it(
    tied_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"prl-lightning\[lora\]"):
        load_policy(tied_model, LORA)


def test_a_run_trains_the_adapter_alone_and_keeps_no_second_model(
    tied_model: str, tmp_path: Path
) -> None:
    lora = "--model.lora={r: 4, lora_alpha: 8, target_modules: all-linear}"
    rate = "--model.optimizer.init_args.lr=0.01"
    fit(*tiny_overrides(tied_model, tmp_path), lora, rate)
    metrics = metrics_of(tmp_path)
    # The engine follows every update, and so does the distance from the model underneath.
    assert max(metrics["rollout/engine_gap_max"]) < 1e-4
    assert metrics["train/kl_ref_k3"][0] == 0 < metrics["train/kl_ref_k3"][1]
    file = tmp_path / "run" / "version_0" / "checkpoints" / "last.ckpt"
    names = torch.load(file, weights_only=True)["state_dict"]
    assert all(".lora_" in name for name in names)
    # A checkpoint of the adapter alone is a whole checkpoint.
    fit(
        *tiny_overrides(tied_model, tmp_path), lora, f"--ckpt_path={file}", "--trainer.max_epochs=3"
    )
    assert len(metrics_of(tmp_path, version=1)["train/loss"]) == 3
