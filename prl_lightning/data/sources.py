"""Read prompts from files and from the Hub, with the columns of TRL or verl."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, config, load_dataset
from datasets.exceptions import DatasetGenerationError
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import Dataset as TorchDataset
from transformers import PreTrainedTokenizerBase

from prl_lightning.data.format import PromptFormat
from prl_lightning.types import Prompt

FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
TOKEN_IDS = "prompt_token_ids"


@dataclass(frozen=True)
class Source:
    """Where rows come from.

    Attributes:
        path: a JSON, JSON-lines or Parquet file, a folder of such files, or a dataset on the Hub.
        name: configuration of the Hub dataset, if it has several.
        split: of the Hub dataset.
    """

    path: str
    name: str | None = None
    split: str = "train"

    @classmethod
    def parse(cls, text: str) -> Source:
        """Parse the short form that configurations use.

        Args:
            text: a file or folder, or ``owner/dataset[/name][:split]`` of the Hub.

        Example:
            >>> Source.parse("data/train.jsonl")
            Source(path='data/train.jsonl', name=None, split='train')
            >>> Source.parse("openai/gsm8k/main:test")
            Source(path='openai/gsm8k', name='main', split='test')
        """
        if Path(text).suffix in FORMATS or Path(text).expanduser().exists():
            return cls(text)
        dataset, _, split = text.partition(":")
        owner, _, rest = dataset.partition("/")
        name, _, configuration = rest.partition("/")
        return cls(f"{owner}/{name}" if name else owner, configuration or None, split or "train")

    def check(self) -> None:
        """Check that a local file exists and has a known format, without reading it.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: a file with a split, or of another format.
        """
        file = Path(self.path).expanduser()
        if file.suffix not in FORMATS:
            if file.is_file():
                raise ValueError(
                    f"data: {self.path!r} has an unknown format. Use {', '.join(FORMATS)} or a "
                    "dataset on the Hub."
                )
        elif self.split != "train":
            raise ValueError(
                f"data: {self.path}:{self.split} names a split, but a file has none. Leave it out."
            )
        elif not file.is_file():
            raise FileNotFoundError(f"data: there is no file {self.path!r}.")

    def load(self) -> Dataset:
        """Read the rows.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: there are no rows, or they cannot be read.
        """
        self.check()
        if Path(self.path).suffix in FORMATS:
            rows = self._load_file()
        else:
            rows = load_dataset(self.path, self.name, split=self.split)
        if len(rows) == 0:
            raise ValueError(f"data: {self.path!r} has no rows.")
        if any(map(_has_twins, rows.features.arrow_schema.types)):
            raise ValueError(
                f"data: {self.path!r} has a column with two fields of the same name (a name ends "
                "at a null character). Rename one."
            )
        return rows

    def _load_file(self) -> Dataset:
        form = FORMATS[Path(self.path).suffix]
        # Otherwise `datasets` reports every load of a local file to the Hub.
        config.HF_UPDATE_DOWNLOAD_COUNTS = False
        try:
            file = str(Path(self.path).expanduser())
            return load_dataset(form, data_files=file, split="train")
        # Each format raises a different error for an empty file.
        except (DatasetGenerationError, StopIteration, ValueError) as error:
            raise ValueError(
                f"data: {self.path!r} has no rows that can be read as {form}: "
                f"{error.__cause__ or error!r}."
            ) from error


def _has_twins(kind: pa.DataType) -> bool:
    """Whether two fields of a type, or of a nested type, have the same name."""
    fields = [kind.field(i) for i in range(kind.num_fields)]
    names = {field.name for field in fields}
    return len(names) < len(fields) or any(_has_twins(field.type) for field in fields)


class PromptSet(TorchDataset[Prompt]):
    """The prompts of one source, rendered once.

    Args:
        source: of the rows.
        form: turns a row into a prompt.
        tokenizer: the policy's.
        max_prompt_tokens: longer prompts are dropped and counted.
        where: field of the configuration that names the source, for messages.

    Raises:
        ValueError: a column is missing, a prompt is empty, or every prompt is too long.
    """

    def __init__(
        self,
        source: Source,
        form: PromptFormat,
        tokenizer: PreTrainedTokenizerBase,
        max_prompt_tokens: int,
        where: str,
    ) -> None:
        named = f"{where} ({source.path})"
        rows = form.rename(source.load(), named).map(
            lambda prompt: {TOKEN_IDS: form.render(prompt, tokenizer)},
            input_columns="prompt",
            desc=f"{where}: rendering prompts",
        )
        lengths = [len(ids) for ids in rows[TOKEN_IDS]]
        if 0 in lengths:
            raise ValueError(
                f"{named}: the prompt of row {lengths.index(0)} has no token that the tokenizer "
                "can encode. Remove the row."
            )
        kept = [row for row, length in enumerate(lengths) if length <= max_prompt_tokens]
        if not kept:
            raise ValueError(
                f"{named}: every prompt is longer than data.max_prompt_tokens={max_prompt_tokens}; "
                f"the shortest has {min(lengths)} tokens."
            )
        if len(kept) < len(rows):
            rank_zero_info(
                f"{where}: {len(rows) - len(kept)} of {len(rows)} prompts are longer than "
                f"data.max_prompt_tokens={max_prompt_tokens} and were dropped."
            )
        self.rows = rows.select(kept)

    def __len__(self) -> int:
        """Return the number of prompts."""
        return len(self.rows)

    def __getitem__(self, index: int) -> Prompt:
        """Return the prompt of a row, with all other columns of the row."""
        columns = dict(self.rows[index])
        token_ids, source = columns.pop(TOKEN_IDS), columns.pop("prompt")
        return Prompt(token_ids, source, columns | _verl_answer(columns))


def _verl_answer(columns: Mapping[str, Any]) -> dict[str, Any]:
    """Return the reference answer of a row in verl's format, under TRL's names."""
    reward_model = columns.get("reward_model")
    if "answer" in columns or not isinstance(reward_model, Mapping):
        return {}
    truth = reward_model.get("ground_truth")
    return {} if truth is None else {"answer": truth, "ground_truth": truth}
