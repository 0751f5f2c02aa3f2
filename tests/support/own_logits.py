"""A causal LM's own logits as the expected values of LogprobModel, and equality of gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def by_the_models_own_logits(
    model: nn.Module, prompt: list[int], completion: list[int], temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of a completion, from its row alone without padding."""
    logits = model(torch.tensor([prompt + completion]), use_cache=False).logits[0] / temperature
    distribution = logits[len(prompt) - 1 : -1].log_softmax(-1)
    logprobs = torch.stack([distribution[t, token] for t, token in enumerate(completion)])
    return logprobs, -(distribution.exp() * distribution).sum(-1)


def assert_equal_gradients(ours: nn.Module, theirs: nn.Module, tolerance: float = 1e-4) -> None:
    """Every parameter has the same gradient, and none is missing."""
    expected = dict(theirs.named_parameters())
    found = dict(ours.named_parameters())
    assert found.keys() == expected.keys()
    for name, parameter in found.items():
        assert parameter.grad is not None, name
        torch.testing.assert_close(
            parameter.grad, expected[name].grad, atol=tolerance, rtol=1e-4, msg=name
        )
