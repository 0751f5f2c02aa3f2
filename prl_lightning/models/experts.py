"""The experts of a mixture in autocast's precision.

transformers multiplies all experts at once by torch's grouped product, which autocast does not
know: beside float32 weights it computes in float32, on a GPU by a slow path.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

try:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
except ImportError:  # transformers 4, whose experts are linear layers, as autocast knows them
    ALL_EXPERTS_FUNCTIONS = None

EXPERTS = "prl_grouped_mm"
GROUPED = "grouped_mm"


def use_autocast_experts(causal_lm: PreTrainedModel) -> None:
    """Let the experts of a model, if it has any, compute as its linear layers do.

    Args:
        causal_lm: with experts in transformers' default way; others are left alone.
    """
    if (
        ALL_EXPERTS_FUNCTIONS is not None
        and causal_lm._can_set_experts_implementation()
        and causal_lm.config.get_text_config()._experts_implementation == GROUPED
    ):
        causal_lm.set_experts_implementation(EXPERTS)


def autocast_experts(module: nn.Module, hidden_states: Tensor, *routing: Any) -> Tensor:
    """Call transformers' grouped product with weights and input in autocast's dtype.

    Args:
        module: the experts, with their weights as parameters.
        hidden_states: (tokens, H).
        routing: the experts of each token and their shares, as the router gives them.

    Returns:
        (tokens, H).
    """
    device = hidden_states.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden_states, module = hidden_states.to(dtype), copy.copy(module)
        # Of the copy alone: the module itself keeps its parameters.
        vars(module)["_parameters"] = {
            name: None if weight is None else weight.to(dtype)
            for name, weight in module._parameters.items()
        }
    product: Tensor = ALL_EXPERTS_FUNCTIONS[GROUPED](module, hidden_states, *routing)
    return product


if ALL_EXPERTS_FUNCTIONS is not None:
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS, autocast_experts)
