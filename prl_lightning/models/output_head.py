"""Refuse models whose logits are more than hidden states times the matrix of their output head.

LogprobModel multiplies in chunks and skips whatever else a model does to its logits, such as
scaling or capping them. Many fields of many architectures ask for that, so a model is not asked for
its fields: its logits are computed, from given hidden states and a small head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel


class _Output(tuple[Tensor]):
    """What a body returns: hidden states, and None for everything else that a model reads."""

    @property
    def last_hidden_state(self) -> Tensor:
        return self[0]

    def __getattr__(self, name: str) -> None:
        return None


def refuse_other_heads(causal_lm: PreTrainedModel, body: nn.Module) -> None:
    """Compare the logits of a model with the product of hidden states and output head.

    Args:
        causal_lm: may be on the meta device, and is not changed.
        body: the model without its head.

    Raises:
        ValueError: they differ.
    """
    config, difference = causal_lm.config.get_text_config(), None
    if getattr(causal_lm.get_output_embeddings(), "bias", None) is not None:
        difference = "has a bias of the output head"
    else:
        try:
            if not _is_product(causal_lm, body):
                difference = f"transforms its logits ({', '.join(_fields(config)) or 'always'})"
        except Exception as error:  # a transform of another size, a second body
            difference = f"has more than a matrix between its body and its logits ({error})"
    if difference:
        raise ValueError(
            f"model.policy: the architecture {config.model_type!r} {difference}, which the chunked "
            "output head does not compute. Use an architecture without."
        )


@torch.no_grad()
def _is_product(causal_lm: PreTrainedModel, body: nn.Module) -> bool:
    """Compute the logits of one token, with a hidden state so large that any cap shows."""
    head = causal_lm.get_output_embeddings()
    name = next(name for name, module in causal_lm.named_modules() if module is head)
    with torch.device("cpu"), torch.autocast("cpu", enabled=False):
        hidden = torch.linspace(-999, 999, head.weight.shape[1], dtype=torch.float32)
        weight = torch.linspace(0, 40, 4 * len(hidden), dtype=torch.float32).cos().view(4, -1)
        token = {"input_ids": torch.zeros(1, 1, dtype=torch.long)}
        with _returning(hidden[None, None], {body, causal_lm.get_decoder()} - {causal_lm}):
            output = functional_call(causal_lm, {f"{name}.weight": weight}, kwargs=token)
        logits = output.logits.float().flatten()
        return torch.allclose(logits, weight @ hidden, rtol=1e-3, atol=1e-3)


@contextmanager
def _returning(hidden: Tensor, bodies: set[nn.Module]) -> Iterator[None]:
    """Let modules return these hidden states; OPT calls the decoder within its body."""
    for body in bodies:
        body.forward = lambda *args, **kwargs: _Output((hidden,))
    try:
        yield
    finally:
        for body in bodies:
            del body.forward


def _fields(config: Any) -> list[str]:
    """Return the fields that probably ask for it, as a hint."""
    return [
        f"{name}={value}"
        for name, value in config.to_dict().items()
        if ("logit" in name or "lm_head" in name) and "attn" not in name
        if isinstance(value, float) and value != 1.0
    ]
