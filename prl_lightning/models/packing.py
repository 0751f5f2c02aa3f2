"""Pack the rows of a batch into one long row, without padding and with each prompt once.

All layers but attention treat each token independently, so they can compute one long row. For
attention, the tokens are gathered into rows again, in blocks of similar length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

# A row shorter than this fraction of its block's longest row starts a new block. Fewer blocks mean
# fewer attention calls; more blocks mean less padding.
SIMILAR = 0.75


class Packing:
    """A batch in one row of N tokens: a prompt, the completions of its group, the next prompt.

    Consecutive rows with equal prompts are a group. A completion's last token predicts nothing and
    is left out. Packing runs on the CPU, before the batch is moved: on a GPU, the host would wait
    for every size that depends on a value.

    This is not a dataclass, because FSDP would search a dataclass for tensors.

    Args:
        prompts: token ids of each row's prompt.
        completions: token ids of each row's completion, without padding.
        is_sampled: bool, which tokens of each completion the policy sampled.

    Attributes:
        input_ids: (1, N).
        position_ids: (1, N), position of each token in its own row.
        predictors: (C,), index in the long row of the token before each of the C sampled tokens,
            in the order of the rows.
        targets: (C,), the sampled tokens.
        cells: (C,), index of each sampled token in the flattened (B, T).
        blocks: one (R, L) per block of R rows of similar length: index of each token in the long
            row. Shorter rows are padded with an arbitrary index; no other token attends to it.
        places: (N,), index of each token of the long row in the concatenated, flattened blocks.
    """

    def __init__(
        self, prompts: Sequence[Tensor], completions: Sequence[Tensor], is_sampled: Sequence[Tensor]
    ) -> None:
        ids, positions, predictors, rows = [], [], [], []
        end, prompt = 0, None
        for own_prompt, completion in zip(prompts, completions, strict=True):
            is_first = prompt is None or not torch.equal(own_prompt, prompt)
            if is_first:
                prompt = own_prompt
                ids.append(prompt)
                positions.append(torch.arange(len(prompt)))
                of_prompt = torch.arange(end, end + len(prompt))
                end += len(prompt)
            own = torch.arange(end, end + max(0, len(completion) - 1))
            predictors.append(torch.cat([of_prompt[-1:], own])[: len(completion)])
            if is_first or len(own):
                rows.append(torch.cat([of_prompt, own]))
            ids.append(completion[:-1])
            positions.append(torch.arange(len(own_prompt), len(own_prompt) + len(own)))
            end += len(own)
        self.input_ids = torch.cat(ids)[None]
        self.position_ids = torch.cat(positions)[None]
        sampled = torch.cat(list(is_sampled))
        self.predictors = torch.cat(predictors)[sampled]
        self.targets = torch.cat(list(completions))[sampled]
        self.cells = pad_sequence(list(is_sampled), batch_first=True).flatten().nonzero()[:, 0]
        self.blocks: list[Tensor] = []
        self.places, start = torch.empty(end, dtype=torch.long), 0
        for block in _of_similar_length(rows):
            self.blocks.append(pad_sequence(block, batch_first=True))
            for row in block:
                self.places[row] = torch.arange(start, start + len(row))
                start += len(block[0])

    def map(self, function: Callable[[Tensor], Tensor]) -> Packing:
        """Return a copy with ``function`` applied to each tensor, for example to move it."""
        mapped = Packing.__new__(Packing)
        for name, value in vars(self).items():
            is_list = isinstance(value, list)
            setattr(mapped, name, [function(x) for x in value] if is_list else function(value))
        return mapped


def _of_similar_length(rows: list[Tensor]) -> Iterator[list[Tensor]]:
    """Yield the rows in blocks of similar length, longest rows first."""
    block: list[Tensor] = []
    for row in sorted(rows, key=len, reverse=True):
        if block and len(row) < SIMILAR * len(block[0]):
            yield block
            block = []
        block.append(row)
    yield block
