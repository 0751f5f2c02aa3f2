"""Read prompts from files and from the Hub, with the columns of TRL or verl."""

from __future__ import annotations

import glob
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, ReadInstruction, config, load_dataset, load_dataset_builder
from datasets.exceptions import DatasetGenerationError
from datasets.packaged_modules.json.json import Json
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import Dataset as TorchDataset
from transformers import PreTrainedTokenizerBase

from prl_lightning.data.format import DataError, PromptFormat
from prl_lightning.data.messages import read_prompt
from prl_lightning.data.rows import Rows, join_rows, json_rows
from prl_lightning.types import Prompt

FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
TOKEN_IDS = "prompt_token_ids"
TRUTH = "ground_truth"  # verl's name of the reference answer, in the column `reward_model`


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
            DataError: a file with a split, or of another format, or a path that cannot be read.
        """
        file = Path(self.path).expanduser()
        # In the path of a file "[" can be escaped.
        marks = ["::", "["] if file.is_dir() else ["::"]
        mark = next((mark for mark in marks if mark in str(file.absolute())), None)
        if mark is not None and file.exists():
            raise DataError(
                f"data: {self.path!r} cannot be read: `datasets` takes {mark!r} in the path of a "
                f"{'folder' if file.is_dir() else 'file'} as a pattern. Rename it."
            )
        if file.suffix not in FORMATS:
            if file.is_file():
                raise DataError(
                    f"data: {self.path!r} has an unknown format. Use {', '.join(FORMATS)} or a "
                    "dataset on the Hub."
                )
        elif self.split != "train":
            raise DataError(
                f"data: {self.path}:{self.split} names a split, but a file has none. Leave it out."
            )
        elif not file.is_file():
            raise FileNotFoundError(f"data: there is no file {self.path!r}.")

    def load(self) -> Rows:
        """Read the rows.

        Raises:
            FileNotFoundError: there is no such file.
            DataError: there are no rows, or they cannot be read.
        """
        self.check()
        if Path(self.path).expanduser().exists():
            # Otherwise `datasets` reports every load of a local file to the Hub.
            config.HF_UPDATE_DOWNLOAD_COUNTS = False
        form = FORMATS.get(Path(self.path).suffix)
        try:
            rows = self._load_dataset() if form is None else self._load_file(form)
        # Each format raises a different error for an empty file.
        except (DatasetGenerationError, StopIteration, ValueError) as error:
            generating = isinstance(error, DatasetGenerationError)
            reason = (error.__cause__ if generating else None) or error
            raise DataError(
                f"data: {self.path!r} has no rows that can be read as {form or 'a dataset'}: "
                f"{' '.join(str(reason).split()).rstrip('.') or repr(reason)}."
            ) from error
        if len(rows) == 0:
            raise DataError(f"data: {self.path!r} has no rows.")
        if any(map(_has_twins, rows.table.features.arrow_schema.types)):
            raise DataError(
                f"data: {self.path!r} has a column with two fields of the same name (a name ends "
                "at a null character). Rename one."
            )
        return rows

    def _load_file(self, form: str) -> Rows:
        files = glob.escape(str(Path(self.path).expanduser().absolute()))
        if form == "json":
            return self._load_json(files)
        return _table(load_dataset(form, data_files=files, split="train"))

    def _load_dataset(self) -> Rows:
        folder = Path(self.path).expanduser()
        builder = load_dataset_builder(str(folder) if folder.exists() else self.path, self.name)
        if isinstance(builder, Json):
            return self._load_json(builder.config.data_files)
        builder.download_and_prepare()
        return _table(builder.as_dataset(split=self.split))

    def _load_json(self, files: Any) -> Rows:
        """Read whole splits and cut them afterwards: a line of a file need not be a row."""
        names = {part.partition("[")[0].strip() for part in self.split.split("+")}
        splits = {
            name: json_rows(
                load_dataset("text", data_files=files, split=name, encoding="utf-8-sig")
            )
            for name in names
        }
        sizes = {name: len(rows) for name, rows in splits.items()}
        return join_rows(
            (splits[part.splitname], range(part.from_, part.to))
            for part in ReadInstruction.from_spec(self.split).to_absolute(sizes)
        )


def _table(table: Dataset) -> Rows:
    return Rows(table, table.column_names)


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
    ) -> None:
        self.where = f"{where} ({source.path})"
        self._rows = source.load()
        self._names = form.find_columns(self._rows.column_names, self.where)
        self._truth = self._truth_columns()
        self._rendered = self._rows.table.map(
            partial(_render, self.where, self._rows.decode, self._names["prompt"], form, tokenizer),
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
    column: str,
    form: PromptFormat,
    tokenizer: PreTrainedTokenizerBase,
    entry: Any,
    row: int,
) -> dict[str, list[int]]:
    """Render the prompt of an entry of a table.

    Raises:
        DataError: it cannot be rendered.
    """
    try:
        return {TOKEN_IDS: form.render(decode(entry).get(column), tokenizer)}
    except Exception as error:  # tokenizers raise anything
        # Messages of transformers go on with the whole chat.
        first_line = str(error).partition("\n")[0]
        raise DataError(f"{where}, row {row}: {first_line or repr(error)}") from error
