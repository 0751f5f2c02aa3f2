"""LoRA: the engine gets the weights that the trainer computes with, and off means off."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from prl_lightning.data import collate
from prl_lightning.models.causal_lm import LogprobModel, named_weights
from prl_lightning.models.loading import load_causal_lm, load_policy
from prl_lightning.models.lora import adapters_off, add_lora
from prl_lightning.types import Rollout, RolloutBatch
from random_models import random_model
from tiny_runs import fit, metrics_of, tiny_overrides

LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}


@pytest.fixture(scope="module")
def batch(make_rollout: Callable[[list[int], list[int]], Rollout]) -> RolloutBatch:
    completions = [[4, 9, 1], [15, 3, 12, 6, 7]]
    return collate([make_rollout([5, 14, 7], ids) for ids in completions], 1, 1)


def adapted(folder: str, **settings: Any) -> LogprobModel:
    """A policy whose adapter changes its values; peft initialises it with zeros."""
    policy = load_policy(folder, LORA | settings)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return policy


@torch.no_grad()
def logprobs(model: LogprobModel, batch: RolloutBatch) -> Tensor:
    return model(batch)[0]


@pytest.mark.parametrize(
    "settings",
    [
        {}, {"use_rslora": True}, {"target_modules": ["q_proj", "embed_tokens"]},
        {"init_lora_weights": "gaussian", "task_type": "CAUSAL_LM", "lora_dropout": 0.0},
        {"exclude_modules": ["o_proj"], "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v": 3}},
        {"target_modules": ["down_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    ],
    ids=lambda settings: "-".join(settings) or "all-linear",
)  # fmt: skip
def test_the_weights_sent_are_those_computed_with(
    untied_model: str, batch: RolloutBatch, settings: dict[str, Any]
) -> None:
    assert_one_policy(untied_model, batch, settings)


def test_transposed_weights_are_sent_as_the_model_has_them(
    batch: RolloutBatch, tmp_path: Path
) -> None:
    random_model("gpt2").save_pretrained(tmp_path)
    assert_one_policy(str(tmp_path), batch, {"fan_in_fan_out": True})


def assert_one_policy(folder: str, batch: RolloutBatch, settings: dict[str, Any]) -> None:
    """Off is the base, what is sent is the trainer's, and every trained parameter is in use."""
    policy = adapted(folder, **settings)
    plain = load_causal_lm(folder)
    base = logprobs(LogprobModel(plain), batch)
    with adapters_off(policy):
        assert torch.equal(logprobs(policy, batch), base)
    plain.load_state_dict(dict(named_weights(policy)), strict=True)
    ours, _ = policy(batch)
    torch.testing.assert_close(logprobs(LogprobModel(plain), batch), ours, atol=1e-5, rtol=0)
    assert (ours - base).abs().max() > 0.02
    ours.sum().backward()
    for name, parameter in policy.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad == (".lora_" in name), name
    assert torch.equal(logprobs(load_policy(folder, LORA | settings), batch), base)


def test_with_the_adapter_off_it_is_the_base_model(tied_model: str, batch: RolloutBatch) -> None:
    policy = adapted(tied_model)
    on = logprobs(policy, batch)
    requires_grad = {name: p.requires_grad for name, p in policy.named_parameters()}
    with adapters_off(policy):
        assert torch.equal(logprobs(policy, batch), logprobs(load_policy(tied_model), batch))
    assert torch.equal(logprobs(policy, batch), on)
    assert requires_grad == {name: p.requires_grad for name, p in policy.named_parameters()}
    assert requires_grad == {name: ".lora_" in name for name in requires_grad}
    assert any(requires_grad.values())


def test_the_adapter_is_the_same_on_every_rank_and_leaves_the_random_state(tied_model: str) -> None:
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        states.append(load_policy(tied_model, LORA).state_dict())
        after = torch.rand(3)
        torch.manual_seed(seed)
        assert torch.equal(torch.rand(3), after)
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("init_lora_weights", kind) for kind in (False, "pissa", "pissa_niter_4", "olora",
                                                   "orthogonal", "eva", "corda", "loftq")),
        ("bias", "all"), ("bias", "lora_only"), ("lora_dropout", 0.1), ("lora_bias", True),
        ("use_dora", True), ("use_qalora", True), ("inference_mode", True),
        ("modules_to_save", ["lm_head"]), ("trainable_token_indices", [3]),
        ("layer_replication", [[0, 2], [0, 2]]), ("target_parameters", ["mlp.experts.down_proj"]),
        ("megatron_config", {"a": 1}), ("alora_invocation_tokens", [3]), ("task_type", "SEQ_CLS"),
    ],
)  # fmt: skip
def test_settings_that_would_make_two_policies_are_refused(
    tied_model: str, field: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("prl_lightning.models.loading.load_causal_lm")  # nothing is loaded
    with pytest.raises(ValueError, match=rf"model\.lora\.{field}={re.escape(repr(value))}"):
        load_policy(tied_model, LORA | {field: value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 4}, r"model\.lora=.*'rank'"),
        ({"r": 0}, r"model\.lora=.*'r': 0"),
        ({"lora_alpha": 0}, r"q_proj.*lora_alpha=0"),
        ({"target_modules": ["no_proj"]}, r"model\.lora=.*no_proj"),
        ({"target_modules": ["embed_tokens"]}, r"model\.embed_tokens.*lm_head\.weight.*target_mod"),
        ({"target_modules": ["lm_head"]}, r"on lm_head.*target_modules"),
    ],
)
def test_adapters_that_cannot_work_are_refused(
    tied_model: str, settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("prl_lightning.models.loading.load_causal_lm")
    with pytest.raises(ValueError, match=message):
        load_policy(tied_model, settings)


def test_an_adapter_on_an_untied_head_is_refused(untied_model: str) -> None:
    with pytest.raises(ValueError, match=r"on lm_head.*target_modules"):
        load_policy(untied_model, {"target_modules": ["q_proj", "lm_head"]})


@pytest.mark.skipif(transformers.__version__ < "5", reason="experts are linear layers")
@pytest.mark.parametrize("kind", ["qwen3_moe", "olmoe", "mixtral"])
def test_an_adapter_on_experts_is_refused(kind: str) -> None:
    with pytest.raises(ValueError, match=r"mlp\.(experts|gate).*target_modules"):
        add_lora(random_model(kind), LORA)
    add_lora(random_model(kind), LORA | {"target_modules": ["q_proj"]})


def test_without_peft_the_error_names_the_extra(
    tied_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"prl-lightning\[lora\]"):
        load_policy(tied_model, LORA)


@pytest.mark.process
def test_a_run_trains_the_adapter_alone_and_keeps_no_second_model(
    tied_model: str, tmp_path: Path
) -> None:
    run = [
        *tiny_overrides(tied_model, tmp_path),
        "--model.lora={r: 4, lora_alpha: 8, target_modules: all-linear}",
        "--model.optimizer.init_args.lr=0.01",
    ]
    fit(*run)
    metrics = metrics_of(tmp_path)
    # The engine follows every update, and so does the divergence from the base model.
    assert max(metrics["rollout/engine_gap_max"]) < 1e-4
    assert metrics["train/kl_ref_k3"][0] == 0 < metrics["train/kl_ref_k3"][1]
    file = tmp_path / "run" / "version_0" / "checkpoints" / "last.ckpt"
    assert all(".lora_" in name for name in torch.load(file, weights_only=True)["state_dict"])
    # Such a checkpoint is complete.
    fit(*run, f"--ckpt_path={file}", "--trainer.max_epochs=3")
    assert len(metrics_of(tmp_path, version=1)["train/loss"]) == 3
