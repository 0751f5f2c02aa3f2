"""Compute the experts of a mixture in autocast's precision.

transformers multiplies all experts at once with torch's grouped matmul, which autocast does not
cast. With float32 weights it would compute in float32, on a GPU with a slow kernel.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

try:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
except ImportError:  # transformers 4: experts are linear layers, which autocast casts
    ALL_EXPERTS_FUNCTIONS = None

EXPERTS = "prl_grouped_mm"
GROUPED = "grouped_mm"


def use_autocast_experts(causal_lm: PreTrainedModel) -> None:
    """Make the experts of a model, if it has any, follow autocast as its linear layers do.

    Args:
        causal_lm: unchanged if its experts implementation is not transformers' default.
    """
    if (
        ALL_EXPERTS_FUNCTIONS is not None
        and causal_lm._can_set_experts_implementation()
        and causal_lm.config.get_text_config()._experts_implementation == GROUPED
    ):
        causal_lm.set_experts_implementation(EXPERTS)


def autocast_experts(module: nn.Module, hidden_states: Tensor, *routing: Any) -> Tensor:
    """Call transformers' grouped matmul with weights and input in autocast's dtype.

    Args:
        module: the experts, with their weights as parameters.
        hidden_states: (tokens, H).
        routing: the experts of each token and their weights, from the router.

    Returns:
        (tokens, H).
    """
    device = hidden_states.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden_states, module = hidden_states.to(dtype), copy.copy(module)
        # Replace the parameters of the copy; the module itself keeps its own.
        vars(module)["_parameters"] = {
            name: None if weight is None else weight.to(dtype)
            for name, weight in module._parameters.items()
        }
    return ALL_EXPERTS_FUNCTIONS[GROUPED](module, hidden_states, *routing)


if ALL_EXPERTS_FUNCTIONS is not None:
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS, autocast_experts)
