"""Recognize what a model does to its logits: scaling and capping, which the blocks compute as well.

LogprobModel multiplies hidden states and output head in blocks. Many fields of many architectures
change the product, so a model is not asked for its fields: its logits are computed, from given
hidden states and a small head. Any other change is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

# Lengths of the hidden states. At the shortest, a tanh is linear; at the longest, it is its cap.
LENGTHS = (1e-6, 0.1, 1.0, 8.0, 60.0, 1e6)


class _Output(tuple[Tensor]):
    """What a body returns: hidden states, and None for everything else that a model reads."""

    @property
    def last_hidden_state(self) -> Tensor:
        return self[0]

    def __getattr__(self, name: str) -> None:
        return None


def logit_transform(causal_lm: PreTrainedModel, body: nn.Module) -> dict[str, Any]:
    """Return how a model gets its logits from the product of hidden states and output head.

    Args:
        causal_lm: may be on the meta device, and is not changed.
        body: the model without its head.

    Returns:
        Arguments of ``token_logprobs``: ``scale``, which is 1 if the product is the logits, and
        ``cap`` if they are capped.

    Raises:
        ValueError: scaling and capping do not give its logits.
    """
    config, difference = causal_lm.config.get_text_config(), None
    if getattr(causal_lm.get_output_embeddings(), "bias", None) is not None:
        difference = "has a bias of the output head"
    else:
        try:
            products, logits = _products_and_logits(causal_lm, body)
        except Exception as error:  # a transform of another size, a second body
            difference = f"has more than a matrix between its body and its logits ({error})"
        else:
            if (transform := _transform(products, logits)) is not None:
                return transform
            difference = f"transforms its logits ({', '.join(_fields(config)) or 'always'})"
    raise ValueError(
        f"model.policy: the architecture {config.model_type!r} {difference}. The output "
        "head computes scaling and tanh capping only. Use an architecture without."
    )


@torch.no_grad()
def _products_and_logits(causal_lm: PreTrainedModel, body: nn.Module) -> tuple[Tensor, Tensor]:
    """Compute the logits of tokens whose hidden states have these lengths, (tokens, 4)."""
    head = causal_lm.get_output_embeddings()
    name = next(name for name, module in causal_lm.named_modules() if module is head)
    with torch.device("cpu"), torch.autocast("cpu", enabled=False):
        lengths = torch.tensor(LENGTHS, dtype=torch.float64)
        width = head.weight.shape[1]
        # A norm after the body would make the lengths equal.
        hidden = lengths[:, None] * torch.linspace(-0.2, 1, width, dtype=torch.float64) / width
        weight = torch.linspace(0, 6, 4 * width, dtype=torch.float64).cos().view(4, -1)
        tokens = {"input_ids": torch.zeros(1, len(lengths), dtype=torch.long)}
        with _returning(hidden[None], {body, causal_lm.get_decoder()} - {causal_lm}):
            output = functional_call(causal_lm, {f"{name}.weight": weight}, kwargs=tokens)
        return hidden @ weight.T, output.logits[0].double()


def _transform(products: Tensor, logits: Tensor) -> dict[str, Any] | None:
    """Return the scale and cap that give the logits, or None if there are none."""
    scale = (logits[0] / products[0]).median().item()
    if abs(scale - 1) < 1e-6:  # some models compute logits in float32
        scale = 1.0
    if torch.allclose(logits, scale * products, rtol=1e-5):
        return {"scale": scale}
    cap = logits[-1].abs().median().item()
    is_capped = torch.allclose(logits, cap * (scale * products / cap).tanh(), rtol=1e-5)
    return {"scale": scale, "cap": cap} if is_capped else None


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
