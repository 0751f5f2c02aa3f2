"""What a causal LM says of a completion by its own logits."""

from __future__ import annotations

import torch
from torch import Tensor


def by_the_models_own_logits(
    model: torch.nn.Module, prompt: list[int], completion: list[int], temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """One row alone, no padding: log-probabilities and entropies of its completion."""
    logits = model(torch.tensor([prompt + completion]), use_cache=False).logits[0] / temperature
    distribution = logits[len(prompt) - 1 : -1].log_softmax(-1)
    logprobs = torch.stack([distribution[t, token] for t, token in enumerate(completion)])
    return logprobs, -(distribution.exp() * distribution).sum(-1)
