"""StepSplitter: the last token of each reasoning step, by length, line end or blank line."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from prl_lightning.functional import delimiter_steps, fixed_length_steps

Steps = Literal["token", "newline", "blank_line"] | int
DELIMITERS = {"newline": "\n", "blank_line": "\n\n"}


class StepSplitter:
    """Mark the last token of each step of a completion (PRL v1).

    A byte-level tokenizer merges line ends with neighbouring characters, and may spread a blank
    line over two tokens. Delimiters are therefore found in the tokens' texts, not by one token id.

    Args:
        steps: "token" (every token is a step), a number of tokens, "newline" or "blank_line".
        tokenizer: gives the texts of the tokens; read for "newline" and "blank_line" only.

    Raises:
        ValueError: ``steps`` is below 1 or another word, or no token contains the delimiter.
    """

    def __init__(self, steps: Steps, tokenizer: PreTrainedTokenizerBase) -> None:
        if isinstance(steps, int) and steps < 1:
            raise ValueError(
                f"model.objective.steps={steps}: use a length of at least 1 token, or 'token'."
            )
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
        """Return bool (B, T), True at the last token of each step; None for "token"."""
        if self.steps == "token":
            return None
        if isinstance(self.steps, int):
            return fixed_length_steps(completion_mask, self.steps)
        self._tables = [table.to(completion_ids.device) for table in self._tables]
        contains, opens, closes = self._tables
        # A model may have more token ids than its tokenizer; the last entry stands for all of them.
        completion_ids = completion_ids.clamp(max=len(contains) - 1)
        ends = delimiter_steps(completion_ids, completion_mask, contains)
        straddles = opens[completion_ids[:, :-1]] & closes[completion_ids[:, 1:]]
        ends[:, 1:] |= straddles & completion_mask[:, :-1] & completion_mask[:, 1:]
        return ends

    def _read_tokens(self, delimiter: str, tokenizer: PreTrainedTokenizerBase) -> None:
        texts = [tokenizer.decode([token]) for token in range(len(tokenizer))] + [""]
        # Two tokens can share a delimiter of two characters: one opens it, the next closes it.
        half = len(delimiter) // 2
        opening, closing = delimiter[:half], delimiter[half:]
        if not any(closing in text for text in texts):
            raise ValueError(
                f"model.objective.steps={self.steps!r}: no token of this tokenizer contains "
                f"{closing!r}, so no step would ever end. Use 'token' or a number of tokens."
            )
        self._tables = [
            torch.tensor([delimiter in text for text in texts]),
            torch.tensor([half > 0 and text.endswith(opening) for text in texts]),
            torch.tensor([half > 0 and text.startswith(closing) for text in texts]),
        ]
