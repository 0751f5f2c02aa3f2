"""The rows of a batch as one long row: no padding is computed, and a group's prompt only once.

Everything but attention treats each token by itself, so the tokens of all rows may stand in one
line. Attention takes the line apart again, row by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from prl_lightning.types import RolloutBatch

ATTENTION = "prl_packed"
# Layers in which a token meets others through attention alone, under transformers' names.
ATTENTION_LAYERS = {"full_attention", "sliding_attention"}


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
        sizes: tokens of each piece of the long row.
        opens: whether a piece is a prompt; the others go on from the last prompt before them.
    """

    def __init__(self, batch: RolloutBatch) -> None:
        ids, positions, predictors = [], [], []
        self.sizes: list[int] = []
        self.opens: list[bool] = []
        end, prompt = 0, None
        lengths = zip(
            batch.prompt_lengths.tolist(), batch.completion_mask.sum(1).tolist(), strict=True
        )
        # On the CPU, where thousands of small slices cost little.
        for row, (prompt_length, length) in zip(batch.input_ids.cpu(), lengths, strict=True):
            if prompt is None or not torch.equal(row[:prompt_length], prompt):
                prompt = row[:prompt_length]
                ids.append(prompt)
                positions.append(torch.arange(prompt_length))
                end += prompt_length
                last_of_prompt = end - 1
                self._add(prompt_length, is_prompt=True)
            own = max(0, length - 1)
            if length:
                predictors += [torch.tensor([last_of_prompt]), torch.arange(end, end + own)]
            if own:
                ids.append(row[prompt_length : prompt_length + own])
                positions.append(torch.arange(prompt_length, prompt_length + own))
                end += own
                self._add(own, is_prompt=False)
        device = batch.input_ids.device
        self.input_ids = torch.cat(ids)[None].to(device)
        self.position_ids = torch.cat(positions)[None].to(device)
        self.predictors = torch.cat(predictors).to(device)

    def _add(self, size: int, is_prompt: bool) -> None:
        self.sizes.append(size)
        self.opens.append(is_prompt)


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


# The pieces differ with every batch: a compiled block goes on around it.
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
    pieces = zip(*(torch.split(x, packing.sizes, dim=2) for x in (query, key, value)), strict=True)
    prompt: Sequence[Tensor] = ()
    outputs = []
    for piece, is_prompt in zip(pieces, packing.opens, strict=True):
        if is_prompt:
            prompt, row, shared = piece, piece, 0
        else:
            # The prompt's queries again: what the plain causal kernels save outweighs them.
            row = tuple(torch.cat(parts, dim=2) for parts in zip(prompt, piece, strict=True))
            shared = prompt[0].shape[2]
        mask = _window(row[0].shape[2], sliding_window, query.device)
        output, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](module, *row, mask, is_causal=True, **kwargs)
        outputs.append(output[:, shared:])
    return torch.cat(outputs, dim=1), None


def _window(tokens: int, size: int | None, device: torch.device) -> Tensor | None:
    """Which keys a query sees, (1, 1, tokens, tokens), where that is not just all before it."""
    if size is None or tokens <= size:
        return None
    seen = torch.ones(tokens, tokens, dtype=torch.bool, device=device)
    return seen.tril().triu(1 - size)[None, None]


AttentionInterface.register(ATTENTION, packed_attention)
AttentionMaskInterface.register(ATTENTION, lambda *args, **kwargs: None)
