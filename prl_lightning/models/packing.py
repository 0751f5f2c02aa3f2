"""The rows of a batch as one long row: no padding is computed, and a group's prompt only once.

Everything but attention treats each token by itself, so the tokens of all rows may stand in one
line. For attention the line is laid out in rows again, those of similar length together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

# A row shorter than this share of its block's longest begins another block: a call costs some too.
SIMILAR = 0.75


class Packing:
    """A batch in one row of N tokens: a prompt, the completions of its group, the next prompt.

    Neighbouring rows with equal prompts are a group. A completion's last token predicts nothing
    and is left out. Made on the CPU before the batch is moved: on a GPU each size that depends on a
    value would be waited for.

    Not a dataclass, whose tensors FSDP would look for on the way to attention.

    Args:
        prompts: token ids of each row's prompt.
        completions: token ids of each row's completion, padded to (B, T) elsewhere.

    Attributes:
        input_ids: (1, N).
        position_ids: (1, N), the place of each token in its own row.
        predictors: (C,), where in the long row the token before each of the C completion tokens of
            the batch is, row after row.
        targets: (C,), the completion tokens themselves.
        cells: (C,), where each of them is in a flattened (B, T).
        blocks: (R, L) for each block of R rows of similar length: where its tokens are in the long
            row. Behind a shorter row stands any token: no other sees it.
        places: (N,), where the tokens of the long row are in the blocks' rows, one after another.
    """

    def __init__(self, prompts: Sequence[Tensor], completions: Sequence[Tensor]) -> None:
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
            if len(completion):
                predictors += [of_prompt[-1:], own]
            if is_first or len(own):
                rows.append(torch.cat([of_prompt, own]))
            if len(own):
                ids.append(completion[:-1])
                positions.append(torch.arange(len(own_prompt), len(own_prompt) + len(own)))
                end += len(own)
        width = max(map(len, completions))
        cells = [torch.arange(len(c)) + row * width for row, c in enumerate(completions)]
        self.input_ids = torch.cat(ids)[None]
        self.position_ids = torch.cat(positions)[None]
        self.predictors = torch.cat(predictors)
        self.targets = torch.cat(list(completions))
        self.cells = torch.cat(cells)
        self.blocks: list[Tensor] = []
        self.places, start = torch.empty(end, dtype=torch.long), 0
        for block in _of_similar_length(rows):
            self.blocks.append(pad_sequence(block, batch_first=True))
            for row in block:
                self.places[row] = torch.arange(start, start + len(row))
                start += len(block[0])

    def map(self, function: Callable[[Tensor], Tensor]) -> Packing:
        """The same with a function applied to each tensor, such as a move to a device.

        Args:
            function: called with each tensor.
        """
        mapped = Packing.__new__(Packing)
        for name, value in vars(self).items():
            is_list = isinstance(value, list)
            setattr(mapped, name, [function(x) for x in value] if is_list else function(value))
        return mapped


def _of_similar_length(rows: list[Tensor]) -> Iterator[list[Tensor]]:
    """Blocks of rows, the longest first."""
    block: list[Tensor] = []
    for row in sorted(rows, key=len, reverse=True):
        if block and len(row) < SIMILAR * len(block[0]):
            yield block
            block = []
        block.append(row)
    yield block
