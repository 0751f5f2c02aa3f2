"""Causal attention over packed rows, for every architecture with replaceable attention."""

from __future__ import annotations

import sys
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from prl_lightning.models.packing import Packing

ATTENTION = "prl_packed"
# Layer types, by transformers' names, that mix tokens through attention only.
ATTENTION_LAYERS = {"full_attention", "sliding_attention"}
# Arguments of attention that transformers' "sdpa" ignores: a cap of scores (Gemma 2), and sinks
# (GPT-OSS).
BEYOND_SDPA = ("softcap", "s_aux")
# Arguments that choose or bias the keys by their place in a row.
OF_PLACES = ("position_bias", "indices", "block_indices")


def disable_cudnn_attention() -> None:
    """Stop ``scaled_dot_product_attention`` from choosing cuDNN in this process.

    torch prefers cuDNN on Hopper, but cuDNN needs about a second to plan each new shape, and nearly
    every micro-batch has new shapes. FlashAttention plans nothing. Importing vLLM has the same
    effect.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def use_exact_attention(causal_lm: PreTrainedModel) -> None:
    """Let a model cap its attention scores, which transformers' default "sdpa" leaves out.

    Args:
        causal_lm: unchanged if it does not cap them.
    """
    config = causal_lm.config.get_text_config()
    is_capped = getattr(config, "attn_logit_softcapping", None) is not None
    if is_capped and config._attn_implementation == "sdpa":
        causal_lm.set_attn_implementation("eager")


class _Arrived(Exception):
    """Raised by the attention that a probe reaches."""


class _Probe:
    """In place of a packing: stops at the first attention."""

    @property
    def blocks(self) -> None:
        raise _Arrived


def pack_attention(causal_lm: PreTrainedModel, body: nn.Module) -> bool:
    """Make a model compute packed rows, if its architecture allows it.

    It must mix tokens only in causal attention that transformers can replace: no recurrent or
    convolutional layers, and no custom attention. Its layers must hand the packing on.

    Args:
        causal_lm: the model.
        body: the same without its head.

    Returns:
        True if the model now computes packed rows, False if it is unchanged.
    """
    use_exact_attention(causal_lm)
    config = causal_lm.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or ())
    is_packable = (
        causal_lm._supports_attention_backend
        and config._attn_implementation in ("sdpa", "eager", ATTENTION)
        and not causal_lm._is_stateful
        and layers <= ATTENTION_LAYERS
    )
    if is_packable:
        before = config._attn_implementation
        causal_lm.set_attn_implementation(ATTENTION)
        is_packable = _hands_on(body)
        causal_lm.set_attn_implementation(ATTENTION if is_packable else before)
    return is_packable


@torch.no_grad()
def _hands_on(body: nn.Module) -> bool:
    """Return whether arguments of a body reach its attention, by calling it up to the first.

    Nemotron's layers take any argument and drop it. Without values, so that a rank that has no
    weights yet finds the same.
    """
    with FakeTensorMode(), torch.device("cpu"):
        tensors = chain(body.named_parameters(), body.named_buffers())
        held = {name: torch.empty(x.shape, dtype=x.dtype) for name, x in tensors}
        token = torch.zeros(1, 1, dtype=torch.long)
        inputs = {"input_ids": token, "position_ids": token, "packing": _Probe()}
        try:
            functional_call(body, held, kwargs=inputs | {"use_cache": False})
        except Exception as error:
            # Whatever else stops the call, such as a branch on a value, says nothing about it.
            return "'packing'" not in str(error)
    return True


# Not compiled: the blocks of rows differ in every batch. The code around it is compiled.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    packing: Packing,
    sliding_window: int | None = None,
    is_causal: bool = True,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Let each token attend to its prompt and to earlier tokens of its row.

    Args:
        module: the attention layer.
        query: (1, heads, N, head size).
        key: (1, key heads, N, head size).
        value: (1, key heads, N, head size).
        attention_mask: always None for packed rows.
        packing: positions of the rows.
        sliding_window: number of visible tokens, including the current one.
        is_causal: always True for packed rows.
        kwargs: other arguments of transformers' attention.

    Returns:
        (1, N, heads, head size), and None in place of attention weights.

    Raises:
        TypeError: an argument has no meaning for packed rows.
    """
    if not is_causal or any(kwargs.get(name) is not None for name in OF_PLACES):
        raise TypeError("'packing' is unknown to an attention that depends on places in a row")
    kind = query.device.type
    if torch.is_autocast_enabled(kind):
        # Cast before gathering the rows, which halves the traffic.
        dtype = torch.get_autocast_dtype(kind)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
    is_exact = any(kwargs.get(name) is not None for name in BEYOND_SDPA)
    if is_exact:
        # The architecture's own, in plain matmuls: its memory grows with the square of a row.
        attend = sys.modules[type(module).__module__].eager_attention_forward
    elif query.is_cuda and query.dtype == torch.float32:
        # No float32 kernel on a GPU takes grouped heads: torch would fall back to plain matmuls,
        # whose memory grows with the square of a row. Repeat the heads, and pass a layer that does
        # not declare them as grouped.
        groups = query.shape[1] // key.shape[1]
        module, key, value = nn.Module(), *(x.repeat_interleave(groups, 1) for x in (key, value))
    outputs = []
    for block in packing.blocks:
        # Each row repeats its group's prompt. The plain causal kernels save more than that costs.
        rows = (
            x.transpose(1, 2)[0].index_select(0, block.flatten()).view(*block.shape, *x.shape[1::2])
            for x in (query, key, value)
        )
        mask = _mask(block.shape[1], sliding_window, query, is_exact)
        output, _ = attend(
            module, *(row.transpose(1, 2) for row in rows), mask, is_causal=True, **kwargs
        )
        outputs.append(output.flatten(0, 1))
    return torch.cat(outputs).index_select(0, packing.places)[None], None


def _mask(tokens: int, window: int | None, query: Tensor, is_exact: bool) -> Tensor | None:
    """Return a mask (1, 1, tokens, tokens) of the visible keys; None for plain causal attention."""
    if not is_exact and (window is None or tokens <= window):
        return None
    seen = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).tril()
    if window is not None:
        seen = seen.triu(1 - window)
    if is_exact:  # added to the scores
        lowest = torch.finfo(query.dtype).min
        return torch.zeros_like(seen, dtype=query.dtype).masked_fill(~seen, lowest)[None, None]
    return seen[None, None]


# No mask function is registered, so transformers builds no mask. With one, it would search the
# positions for packed rows, and the host would wait for the GPU.
AttentionInterface.register(ATTENTION, packed_attention)
