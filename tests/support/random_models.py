"""Random models of any architecture, and micro-batches for them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from prl_lightning.data import collate
from prl_lightning.types import Completion, Prompt, Rollout, RolloutBatch

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "initializer_range": 0.2,
}  # fmt: skip
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def random_model(kind: str, **sizes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    experts = EXPERTS if "moe" in kind else {}
    if kind == "mixtral":
        experts = {"num_local_experts": 8, "num_experts_per_tok": 2}
    config = AutoConfig.for_model(kind, **SIZES | experts | sizes)
    return AutoModelForCausalLM.from_config(config).eval()


def batch_of(
    lengths: list[int], prompt: int = 9, group: int = 3, vocabulary: int = 64
) -> RolloutBatch:
    draw = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(4, SIZES["vocab_size"], (count,), generator=draw).tolist()

    rollouts = []
    for row, length in enumerate(lengths):
        if row % group == 0:
            shared = Prompt(ids(prompt), "")
        completion = Completion(ids(length), [-1.0] * length, True)
        advantage = torch.tensor(0.5 if row % 2 else -0.5)
        rollouts.append(Rollout(shared, completion, "", outcome_advantage=advantage))
    return collate(rollouts, sum(lengths), len(lengths))
