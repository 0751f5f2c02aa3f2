"""Read prompts from files and from the Hub, in TRL's and in verl's columns."""

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
        path: a JSON, JSON-lines or Parquet file, a folder of such, or a dataset on the Hub.
        name: the Hub dataset's configuration, where it has several.
        split: the Hub dataset's split.
    """

    path: str
    name: str | None = None
    split: str = "train"

    @classmethod
    def parse(cls, text: str) -> Source:
        """Read the short form that configurations use.

        Args:
            text: a file, or ``owner/dataset[/name][:split]`` of the Hub.

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
        """Look whether it can be there, without reading it.

        Raises:
            FileNotFoundError: a file that is not there.
            ValueError: a split of a file.
        """
        file = Path(self.path).expanduser()
        if file.suffix in FORMATS and self.split != "train":
            raise ValueError(
                f"data: {self.path}:{self.split} names a split, but a file has none. Leave it out."
            )
        if file.suffix in FORMATS and not file.is_file():
            raise FileNotFoundError(f"data: there is no file {self.path!r}.")

    def load(self) -> Dataset:
        """Read the rows.

        Raises:
            FileNotFoundError: a file that is not there.
            ValueError: it has no rows, or is not in a format that is read.
        """
        self.check()
        file = Path(self.path).expanduser()
        if file.suffix in FORMATS:
            rows = self._load_file(file)
        elif file.is_file():
            raise ValueError(
                f"data: {self.path!r} is not read: use one of {', '.join(FORMATS)}, or a dataset "
                "on the Hub."
            )
        else:
            rows = load_dataset(self.path, self.name, split=self.split)
        if len(rows) == 0:
            raise ValueError(f"data: {self.path!r} has no rows.")
        if any(map(_has_twins, rows.features.arrow_schema.types)):
            raise ValueError(
                f"data: {self.path!r} has a column with two fields of one name (what follows a "
                "null character in a name is not read). Rename one."
            )
        return rows

    def _load_file(self, file: Path) -> Dataset:
        form = FORMATS[file.suffix]
        # A file of the user's is nobody else's business: `datasets` would report its every load.
        config.HF_UPDATE_DOWNLOAD_COUNTS = False
        try:
            return load_dataset(form, data_files=str(file), split="train")
        # An empty file fails in a way of its own in each format.
        except (DatasetGenerationError, StopIteration, ValueError) as error:
            cause = error.__cause__ or error
            raise ValueError(
                f"data: {self.path!r} has no rows that can be read as {form}: {cause!r}."
            ) from error


def _has_twins(kind: pa.DataType) -> bool:
    """Whether two fields of a type, or of a type in it, have one name."""
    fields = [kind.field(i) for i in range(kind.num_fields)]
    names = {field.name for field in fields}
    return len(names) < len(fields) or any(_has_twins(field.type) for field in fields)


class PromptSet(TorchDataset[Prompt]):
    """The prompts of one source: renders once, gives ``Prompt`` objects by index.

    Args:
        source: where the rows come from.
        form: how they are rendered.
        tokenizer: the policy's.
        max_prompt_tokens: longer prompts are left out, with a count.
        where: the field of the configuration it stands in, for messages.

    Raises:
        ValueError: a column is missing, a prompt is empty, or every one is too long.
    """

    def __init__(
        self,
        source: Source,
        form: PromptFormat,
        tokenizer: PreTrainedTokenizerBase,
        max_prompt_tokens: int,
        where: str,
    ) -> None:
        rows = form.rename(source.load(), f"{where} ({source.path})")
        rows = rows.map(
            lambda prompt: {TOKEN_IDS: form.render(prompt, tokenizer)},
            input_columns="prompt",
            desc=f"{where}: rendering prompts",
        )
        lengths = [len(ids) for ids in rows[TOKEN_IDS]]
        if 0 in lengths:
            raise ValueError(
                f"{where} ({source.path}): the tokenizer knows nothing of the prompt of row "
                f"{lengths.index(0)}, which is then empty. Remove the row."
            )
        kept = [row for row, length in enumerate(lengths) if length <= max_prompt_tokens]
        if len(kept) < len(rows):
            rank_zero_info(
                f"{where}: {len(rows) - len(kept)} of {len(rows)} prompts are longer than "
                f"data.max_prompt_tokens={max_prompt_tokens} and were left out."
            )
        if not kept:
            raise ValueError(
                f"{where} ({source.path}): every prompt is longer than data.max_prompt_tokens="
                f"{max_prompt_tokens}; the shortest has {min(lengths)} tokens."
            )
        self.rows = rows.select(kept)

    def __len__(self) -> int:
        """Number of prompts."""
        return len(self.rows)

    def __getitem__(self, index: int) -> Prompt:
        """The prompt of a row, with every other column of it."""
        columns = dict(self.rows[index])
        token_ids, source = columns.pop(TOKEN_IDS), columns.pop("prompt")
        return Prompt(token_ids, source, columns | _verl_answer(columns))

    @property
    def column_names(self) -> set[str]:
        """Columns that reward functions can have."""
        return set(self[0].columns)


def _verl_answer(columns: Mapping[str, Any]) -> dict[str, Any]:
    """The reference answer of a row in verl's form, under TRL's usual name."""
    reward_model = columns.get("reward_model")
    if "answer" in columns or not isinstance(reward_model, Mapping):
        return {}
    truth = reward_model.get("ground_truth")
    return {} if truth is None else {"answer": truth, "ground_truth": truth}
