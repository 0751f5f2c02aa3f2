"""The experts of a mixture compute in autocast's precision, and as transformers' own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from observer import Observer
from prl_lightning.data import collate
from prl_lightning.models.causal_lm import LogprobModel
from prl_lightning.types import Rollout, RolloutBatch

pytest.importorskip("transformers.integrations.moe", reason="transformers 4 has linear experts")
SIZES: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "initializer_range": 0.3,
    "num_experts_per_tok": 2, "moe_intermediate_size": 8,
}  # fmt: skip
EXPERTS = {"qwen2_moe": "num_experts", "qwen3_moe": "num_experts", "olmoe": "num_experts",
           "mixtral": "num_local_experts"}  # fmt: skip


class Products(Observer):
    """Dtypes of inputs and weights of grouped products."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped: set[torch.dtype] = set()

    def see(self, func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        if "grouped_mm" in func.name():
            self.grouped |= {args[0].dtype, args[1].dtype}


def mixture(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES | {EXPERTS[kind]: 4})
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture
def batch(make_rollout: Callable[[list[int], list[int]], Rollout]) -> RolloutBatch:
    rows = [([5, 14, 7], [4, 9, 1]), ([5, 14, 7], [8]), ([6, 13], [2, 9, 10, 1])]
    return collate([make_rollout(*row) for row in rows], 1, 1)


def trained(model: LogprobModel, batch: RolloutBatch) -> dict[str, Tensor]:
    model(batch)[0].sum().backward()
    return {name: weight.grad for name, weight in model.causal_lm.named_parameters()}


@pytest.mark.parametrize("kind", EXPERTS)
def test_experts_compute_in_autocasts_precision(kind: str, batch: RolloutBatch) -> None:
    model = LogprobModel(mixture(kind))
    with torch.autocast("cpu", dtype=torch.bfloat16), Products() as products:
        low = trained(model, batch)
    assert products.grouped == {torch.bfloat16}
    assert {gradient.dtype for gradient in low.values()} == {torch.float32}
    exact = trained(LogprobModel(mixture(kind)), batch)
    experts = [name for name in exact if ".experts." in name]
    assert len(experts) == 4
    for name in experts:  # far from uniform, so that rounding shows
        assert 1e-4 < (low[name] - exact[name]).abs().max() / exact[name].abs().max() < 0.25, name


@pytest.mark.parametrize("kind", EXPERTS)
def test_without_autocast_they_are_transformers_own(kind: str, batch: RolloutBatch) -> None:
    ours, theirs = LogprobModel(mixture(kind)), LogprobModel(mixture(kind))
    theirs.causal_lm.set_experts_implementation("eager")
    with Products() as products:
        gradients = trained(ours, batch)
    assert products.grouped == {torch.float32}
    for name, gradient in trained(theirs, batch).items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


def test_experts_that_were_chosen_otherwise_are_left_alone() -> None:
    model = mixture("qwen3_moe")
    model.set_experts_implementation("eager")
    assert LogprobModel(model).causal_lm.config._experts_implementation == "eager"
