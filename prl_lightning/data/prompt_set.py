"""PromptSet: the prompts of the rows of a source, rendered once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import Dataset as TorchDataset
from transformers import PreTrainedTokenizerBase

from prl_lightning.data.format import DataError, PromptFormat, ToolsOf
from prl_lightning.data.messages import read_prompt
from prl_lightning.data.sources import Source
from prl_lightning.types import Prompt

TOKEN_IDS = "prompt_token_ids"
TRUTH = "ground_truth"  # verl's name of the reference answer, in the column `reward_model`


class PromptSet(TorchDataset[Prompt]):
    """The prompts of one source, rendered once.

    Args:
        source: of the rows.
        form: turns a row into a prompt.
        tokenizer: the policy's.
        max_prompt_tokens: longer prompts are dropped and counted.
        where: field of the configuration that names the source, for messages.
        tools_of: returns what the chat template is told of a row's tools, by its columns.

    Attributes:
        where: the field and the source.
        columns: of every prompt.

    Raises:
        DataError: a column is missing, a prompt cannot be rendered, or every prompt is too long.
    """

    def __init__(
        self,
        source: Source,
        form: PromptFormat,
        tokenizer: PreTrainedTokenizerBase,
        max_prompt_tokens: int,
        where: str,
        tools_of: ToolsOf | None = None,
    ) -> None:
        self.where = f"{where} ({source.path})"
        self._rows = source.load()
        self._names = form.find_columns(self._rows.column_names, self.where)
        self._truth = self._truth_columns()
        self._rendered = self._rows.table.map(
            partial(_render, self.where, self._rows.decode, self._names, form, tokenizer, tools_of),
            with_indices=True,
            remove_columns=self._rows.table.column_names,
            desc=f"{where}: rendering prompts",
        )
        lengths = [len(ids) for ids in self._rendered[TOKEN_IDS]]
        if 0 in lengths:
            raise DataError(
                f"{self.where}, row {lengths.index(0)}: the prompt has no token that the tokenizer "
                "can encode. Remove the row."
            )
        self._kept = [row for row, length in enumerate(lengths) if length <= max_prompt_tokens]
        if not self._kept:
            raise DataError(
                f"{self.where}: every prompt is longer than data.max_prompt_tokens="
                f"{max_prompt_tokens}; the shortest has {min(lengths)} tokens."
            )
        if len(self._kept) < len(lengths):
            rank_zero_info(
                f"{where}: {len(lengths) - len(self._kept)} of {len(lengths)} prompts are longer "
                f"than data.max_prompt_tokens={max_prompt_tokens} and were dropped."
            )

    def __len__(self) -> int:
        """Return the number of prompts."""
        return len(self._kept)

    def __getitem__(self, index: int) -> Prompt:
        """Return the prompt of a row, with all other columns of the source."""
        row = self._kept[index]
        values = self._rows[row]
        columns = {name: values.get(theirs) for name, theirs in self._names.items()}
        columns |= dict.fromkeys(self._truth, _truth(columns.get("reward_model")))
        source = read_prompt(columns.pop("prompt"))
        return Prompt(self._rendered[row][TOKEN_IDS], source, columns)

    @property
    def columns(self) -> set[str]:
        """Names of the columns that every prompt has."""
        return self._names.keys() - {"prompt"} | self._truth

    def _truth_columns(self) -> set[str]:
        """Return TRL's names of the reference answers, if the rows have them in verl's format."""
        theirs = self._names.get("reward_model")
        if theirs is None or "answer" in self._names:
            return set()
        models = (row.get(theirs) for row in self._rows)
        is_verl = any(isinstance(model, Mapping) and TRUTH in model for model in models)
        return {"answer", TRUTH} if is_verl else set()


def _truth(reward_model: Any) -> Any:
    return reward_model.get(TRUTH) if isinstance(reward_model, Mapping) else None


def _render(
    where: str,
    decode: Callable[[Any], dict[str, Any]],
    names: Mapping[str, str],
    form: PromptFormat,
    tokenizer: PreTrainedTokenizerBase,
    tools_of: ToolsOf | None,
    entry: Any,
    row: int,
) -> dict[str, list[int]]:
    """Render the prompt of an entry of a table.

    Raises:
        DataError: it cannot be rendered.
    """
    try:
        values = decode(entry)
        columns = {name: values.get(theirs) for name, theirs in names.items()}
        tools = None if tools_of is None else tools_of(columns)
        return {TOKEN_IDS: form.render(columns["prompt"], tokenizer, tools)}
    except Exception as error:  # tokenizers raise anything
        # Messages of transformers go on with the whole chat.
        first_line = str(error).partition("\n")[0]
        raise DataError(f"{where}, row {row}: {first_line or repr(error)}") from error
