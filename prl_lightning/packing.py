"""The rows of a batch as one long row: no padding is computed, and a group's prompt only once.

Everything but attention treats each token by itself, so the tokens of all rows may stand in one
line. For attention the line is laid out in rows again, those of similar length together.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from prl_lightning.types import RolloutBatch

ATTENTION = "prl_packed"
# Layers in which a token meets others through attention alone, under transformers' names.
ATTENTION_LAYERS = {"full_attention", "sliding_attention"}
# A row shorter than this share of its block's longest begins another block: a call costs some too.
SIMILAR = 0.75


class Packing:
    """A batch in one row of N tokens: a prompt, the completions of its group, the next prompt.

    Neighbouring rows with equal prompts are a group. A completion's last token predicts nothing
    and is left out.

    Not a dataclass, whose tensors FSDP would look for on the way to attention.

    Args:
        batch: completions of B rows.

    Attributes:
        input_ids: (1, N).
        position_ids: (1, N), the place of each token in its own row.
        predictors: (completion tokens of the batch,) where in the long row the token before each of
            them is, in the order of ``completion_ids[completion_mask]``.
        blocks: (R, L) for each block of R rows of similar length: where its tokens are in the long
            row. Behind a shorter row stands any token: no other sees it.
        places: (N,), where the tokens of the long row are in the blocks' rows, one after another.
    """

    def __init__(self, batch: RolloutBatch) -> None:
        ids, positions, predictors, rows = [], [], [], []
        end, prompt = 0, None
        lengths = zip(
            batch.prompt_lengths.tolist(), batch.completion_mask.sum(1).tolist(), strict=True
        )
        # On the CPU, where thousands of small slices cost little.
        for row, (prompt_length, length) in zip(batch.input_ids.cpu(), lengths, strict=True):
            is_first = prompt is None or not torch.equal(row[:prompt_length], prompt)
            if is_first:
                prompt = row[:prompt_length]
                ids.append(prompt)
                positions.append(torch.arange(prompt_length))
                of_prompt = torch.arange(end, end + prompt_length)
                end += prompt_length
            own = torch.arange(end, end + max(0, length - 1))
            if length:
                predictors += [of_prompt[-1:], own]
            if is_first or len(own):
                rows.append(torch.cat([of_prompt, own]))
            if len(own):
                ids.append(row[prompt_length : prompt_length + len(own)])
                positions.append(torch.arange(prompt_length, prompt_length + len(own)))
                end += len(own)
        device = batch.input_ids.device
        self.input_ids = torch.cat(ids)[None].to(device)
        self.position_ids = torch.cat(positions)[None].to(device)
        self.predictors = torch.cat(predictors).to(device)
        self.blocks = []
        places, start = torch.empty(end, dtype=torch.long), 0
        for block in _of_similar_length(rows):
            self.blocks.append(pad_sequence(block, batch_first=True).to(device))
            for row in block:
                places[row] = torch.arange(start, start + len(row))
                start += len(block[0])
        self.places = places.to(device)


def _of_similar_length(rows: list[Tensor]) -> Iterator[list[Tensor]]:
    """Blocks of rows, the longest first."""
    block: list[Tensor] = []
    for row in sorted(rows, key=len, reverse=True):
        if block and len(row) < SIMILAR * len(block[0]):
            yield block
            block = []
        block.append(row)
    yield block


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


def _window(tokens: int, size: int | None, device: torch.device) -> Tensor | None:
    """Which keys a query sees, (1, 1, tokens, tokens), where that is not just all before it."""
    if size is None or tokens <= size:
        return None
    seen = torch.ones(tokens, tokens, dtype=torch.bool, device=device)
    return seen.tril().triu(1 - size)[None, None]


AttentionInterface.register(ATTENTION, packed_attention)
AttentionMaskInterface.register(ATTENTION, lambda *args, **kwargs: None)
