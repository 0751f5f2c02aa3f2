"""The gradient of a weight that is both embedding and output head, as one tensor on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import PreTrainedModel


def is_tied(causal_lm: PreTrainedModel) -> bool:
    """Whether ``embed_tied`` computes the same as a model's own embedding, and saves memory.

    A GPU has no page faults, and torch sums the embedding's gradient there in a fixed order. In
    half precision each row would be rounded as it is added.
    """
    embedding, head = causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()
    return (
        type(embedding) is nn.Embedding  # subclasses scale
        and embedding.weight is head.weight
        and embedding.weight.is_cpu
        and embedding.weight.dtype in (torch.float32, torch.float64)
        and embedding.max_norm is None
    )


def embed_tied(embedding: nn.Embedding, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Look up tokens, and return the weight for an output head that is computed from them.

    autograd would make a gradient of the size of the vocabulary for either use and add them. This
    adds the few rows of the embedding to the gradient of the head.

    Args:
        embedding: its weight is (V, H).
        ids: (..., N).

    Returns:
        Embedded tokens (..., N, H) and the weight (V, H).
    """
    both: tuple[Tensor, Tensor] = _EmbedTied.apply(  # type: ignore[no-untyped-call]
        embedding.weight, ids, embedding.padding_idx
    )
    return both


class _EmbedTied(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, ids: Tensor, padding_idx: int | None
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(ids)
        ctx.padding_idx = padding_idx
        return functional.embedding(ids, weight), weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_embedded: Tensor, grad_weight: Tensor) -> tuple[Tensor, None, None]:
        (ids,) = ctx.saved_tensors
        ids, rows = ids.flatten(), grad_embedded.flatten(0, -2)
        if ctx.padding_idx is not None:  # the embedding of padding is not trained
            rows = rows * (ids != ctx.padding_idx)[:, None]
        # No one else reads this gradient: autograd has summed that of every use into it.
        return grad_weight.index_add_(0, ids, rows.to(grad_weight.dtype)), None, None
