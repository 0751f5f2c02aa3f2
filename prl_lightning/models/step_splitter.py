"""Where a reasoning step ends, for a tokenizer: fixed lengths, line ends, blank lines."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from prl_lightning.functional import delimiter_steps, fixed_length_steps

Steps = Literal["token", "newline", "blank_line"] | int
DELIMITERS = {"newline": "\n", "blank_line": "\n\n"}


class StepSplitter:
    """Mark the last token of every step of a completion (PRL v1, steps).

    A byte-level tokenizer merges a line end with its neighbours and may also spread a blank line
    over two tokens, so tokens are compared by their text and not by one id.

    Args:
        steps: "token" (every token is a step), a number of tokens, "newline" or "blank_line".
        tokenizer: its tokens' texts decide where a delimiter is; not used by the other kinds.

    Raises:
        ValueError: a length below 1, another word, or no token of the tokenizer has the delimiter.
    """

    def __init__(self, steps: Steps, tokenizer: PreTrainedTokenizerBase) -> None:
        if isinstance(steps, int) and steps < 1:
            raise ValueError(f"model.objective.steps={steps}: a step has at least 1 token.")
        if isinstance(steps, str) and steps not in ("token", *DELIMITERS):
            raise ValueError(
                f"model.objective.steps={steps!r}: use 'token', a number of tokens, "
                f"{' or '.join(map(repr, DELIMITERS))}."
            )
        self.steps = steps
        self._tables: list[Tensor] = []
        if steps in DELIMITERS:
            self._read_tokens(DELIMITERS[str(steps)], tokenizer)

    def __call__(self, completion_ids: Tensor, completion_mask: Tensor) -> Tensor | None:
        """Return bool (B, T), True at the last token of each step; None for the token form."""
        if self.steps == "token":
            return None
        if isinstance(self.steps, int):
            return fixed_length_steps(completion_mask, self.steps)
        self._tables = [table.to(completion_ids.device) for table in self._tables]
        contains, opens, closes = self._tables
        # A model may have more rows than its tokenizer has tokens; the last entry stands for them.
        completion_ids = completion_ids.clamp(max=len(contains) - 1)
        ends = delimiter_steps(completion_ids, completion_mask, contains)
        straddles = opens[completion_ids[:, :-1]] & closes[completion_ids[:, 1:]]
        both = completion_mask[:, :-1] & completion_mask[:, 1:]
        ends[:, 1:] |= straddles & both
        return ends

    def _read_tokens(self, delimiter: str, tokenizer: PreTrainedTokenizerBase) -> None:
        texts = [tokenizer.decode([token]) for token in range(len(tokenizer))] + [""]
        half = len(delimiter) // 2
        # A delimiter of two characters may be split between two tokens: one opens, one closes.
        opening, closing = delimiter[:half], delimiter[half:]
        self._tables = [
            torch.tensor([delimiter in text for text in texts]),
            torch.tensor([half > 0 and text.endswith(opening) for text in texts]),
            torch.tensor([half > 0 and text.startswith(closing) for text in texts]),
        ]
        if not any(closing in text for text in texts):
            raise ValueError(
                f"model.objective.steps: no token of this tokenizer contains {closing!r}, so no "
                "step would ever end. Use 'token' or a number of tokens."
            )
