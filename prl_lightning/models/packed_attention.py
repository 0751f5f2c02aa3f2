"""Causal attention over packed rows, for any architecture that lets its attention be replaced."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from prl_lightning.models.packing import Packing

ATTENTION = "prl_packed"
# Layers in which a token meets others through attention alone, under transformers' names.
ATTENTION_LAYERS = {"full_attention", "sliding_attention"}


def disable_cudnn_attention() -> None:
    """Take cuDNN out of what ``scaled_dot_product_attention`` chooses from, in this process.

    On Hopper torch prefers it, but it makes an execution plan for every new shape, which takes
    about a second, and nearly each micro-batch has new ones. FlashAttention needs none. vLLM does
    the same where it is imported.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def pack_attention(causal_lm: PreTrainedModel) -> bool:
    """Make a model read packed rows, if it can.

    It can where tokens meet in causal attention alone, which transformers lets one replace: not in
    a recurrent or convolutional layer, and not in an attention of the architecture's own.

    Returns:
        Whether it was done; the model is unchanged otherwise.
    """
    config = causal_lm.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or ())
    can = (
        causal_lm._supports_attention_backend
        and config._attn_implementation in ("sdpa", ATTENTION)
        and not causal_lm._is_stateful
        and layers <= ATTENTION_LAYERS
    )
    if can:
        causal_lm.set_attn_implementation(ATTENTION)
    return can


# The blocks of rows differ with every batch: a compiled block goes on around it.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    packing: Packing,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention of each row to its prompt and itself.

    Args:
        module: the attention layer.
        query: (1, heads, N, head size).
        key: (1, key heads, N, head size).
        value: (1, key heads, N, head size).
        attention_mask: none is made for packed rows.
        packing: where the rows are.
        sliding_window: tokens that are seen, the present one included.
        kwargs: what transformers' attention takes beside.

    Returns:
        (1, N, heads, head size), and no attention weights.
    """
    kind = query.device.type
    if torch.is_autocast_enabled(kind):
        # Now, and not inside the attention: half the bytes are gathered below.
        dtype = torch.get_autocast_dtype(kind)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if query.is_cuda and query.dtype == torch.float32:
        module, key, value = _with_all_heads(query, key, value)
    outputs = []
    for block in packing.blocks:
        # A group's prompt in each of its rows: what the plain causal kernels save outweighs that.
        rows = (
            x.transpose(1, 2)[0].index_select(0, block.flatten()).view(*block.shape, *x.shape[1::2])
            for x in (query, key, value)
        )
        mask = _window(block.shape[1], sliding_window, query.device)
        output, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](
            module, *(row.transpose(1, 2) for row in rows), mask, is_causal=True, **kwargs
        )
        outputs.append(output.flatten(0, 1))
    return torch.cat(outputs).index_select(0, packing.places)[None], None


def _with_all_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[nn.Module, Tensor, Tensor]:
    """Keys and values of every head, and a layer that says of no heads that they are grouped.

    No kernel for float32 on a GPU takes grouped heads: torch would fall back to plain products,
    whose memory grows with the square of a row.
    """
    groups = query.shape[1] // key.shape[1]
    return nn.Module(), key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)


def _window(tokens: int, size: int | None, device: torch.device) -> Tensor | None:
    """Which keys a query sees, (1, 1, tokens, tokens), where that is not just all before it."""
    if size is None or tokens <= size:
        return None
    seen = torch.ones(tokens, tokens, dtype=torch.bool, device=device)
    return seen.tril().triu(1 - size)[None, None]


# Without a mask function of this name transformers makes none; with one it would first look for
# packed rows in the positions, which a GPU has to be waited for.
AttentionInterface.register(ATTENTION, packed_attention)
