"""Read prompts from files and from the Hub, with the columns of TRL or verl."""

from __future__ import annotations

import glob
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, ReadInstruction, config, load_dataset, load_dataset_builder
from datasets.exceptions import DatasetGenerationError
from datasets.packaged_modules.json.json import Json

from prl_lightning.data.format import DataError
from prl_lightning.data.rows import Rows, join_rows, json_rows
from prl_lightning.models.loading import why_unreadable

FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}


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
            raise FileNotFoundError(
                f"data: there is no file {self.path!r} under {Path.cwd()}. Correct data.train or "
                "evaluation.sets."
            )

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
        except OSError as error:
            why = why_unreadable(self.path, error)
            raise DataError(f"data: {self.path!r} cannot be read: {why}") from error
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
