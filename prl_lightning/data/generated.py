"""GeneratedPrompts: the prompts of a PromptSource, made when they are read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.utils.data import Dataset as TorchDataset
from transformers import PreTrainedTokenizerBase

from prl_lightning.data.format import DataError, PromptFormat, ToolsOf
from prl_lightning.data.messages import read_prompt
from prl_lightning.types import Prompt, PromptSource

ATTEMPTS = 1000  # for one position


class GeneratedPrompts(TorchDataset[Prompt]):
    """The prompts of a source, without the problems that evaluation sets have.

    The first row of a position that is neither excluded nor too long is its prompt, so it depends
    only on the source, the position and the excluded problems.

    Args:
        source: makes rows.
        form: turns a row into a prompt; the names of the columns are the source's.
        tokenizer: the policy's.
        max_prompt_tokens: rows with longer prompts are refused.
        where: field of the configuration that names the source, for messages.
        tools_of: returns what the chat template is told of a row's tools, by its columns.
        excluded: problems that no row may have; see ``problem_of``.

    Attributes:
        where: the field and the source.
        columns: of every prompt.

    Raises:
        DataError: a position has no row that can be used.
    """

    def __init__(
        self,
        source: PromptSource,
        form: PromptFormat,
        tokenizer: PreTrainedTokenizerBase,
        max_prompt_tokens: int,
        where: str,
        tools_of: ToolsOf | None = None,
        excluded: Iterable[str] = (),
    ) -> None:
        self.where = f"{where} ({type(source).__name__})"
        self._source = source
        self._form = form
        self._tokenizer = tokenizer
        self._max_prompt_tokens = max_prompt_tokens
        self._tools_of = tools_of
        self._excluded = set(excluded)
        self.columns = set(self[0].columns)

    def __len__(self) -> int:
        """Return the number of prompts."""
        return len(self._source)

    def __getitem__(self, index: int) -> Prompt:
        """Return the prompt of a position."""
        refused: dict[str, int] = {}
        for attempt in range(ATTEMPTS):
            prompt, reason = self._try(index, attempt)
            if prompt is not None:
                return prompt
            refused[reason] = refused.get(reason, 0) + 1
        counted = "; ".join(f"{count} x {reason}" for reason, count in refused.items())
        raise DataError(
            f"{self.where}: none of {ATTEMPTS} rows of position {index} can be used: {counted}. "
            "Lower the size of the evaluation sets, or take problems of which there are more."
        )

    def distinct(self) -> list[Prompt]:
        """Return all prompts of an evaluation set, each problem once."""
        prompts = []
        for index in range(len(self)):
            prompts.append(self[index])
            self._excluded.add(problem_of(prompts[-1]))
        return prompts

    def _try(self, index: int, attempt: int) -> tuple[Prompt | None, str]:
        """Return a prompt, or None and the reason."""
        try:
            columns = dict(self._source.row(index, attempt))
            source = read_prompt(columns.pop("prompt", None))
            tools = None if self._tools_of is None else self._tools_of(columns)
            token_ids = self._form.render(source, self._tokenizer, tools)
        except Exception as error:  # some generators fail at some seeds
            return None, f"it cannot be made ({type(error).__name__}: {error})"
        prompt = Prompt(token_ids, source, columns)
        if problem_of(prompt) in self._excluded:
            return None, "its problem is in an evaluation set already"
        if len(token_ids) > self._max_prompt_tokens:
            return None, f"longer than data.max_prompt_tokens={self._max_prompt_tokens}"
        return prompt, ""


def problem_of(prompt: Prompt) -> str:
    """Return the text by which two prompts are the same problem.

    It is the column ``question`` or else the prompt, without differences in white space.
    """
    source: Any = prompt.columns.get("question") or prompt.source
    text = source if isinstance(source, str) else source[-1].get("content")
    return " ".join(str(text).split())
