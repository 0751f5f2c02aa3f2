"""Rows: what a source has, with the values of the file."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

from datasets import Dataset, concatenate_datasets

LINE = "text"  # the column that the text reader of `datasets` writes
_NOT_SPACE = re.compile(r"\S")
_SURROGATE = re.compile(r"\\u[dD]")


@dataclass(frozen=True)
class Rows(Sequence[dict[str, Any]]):
    """The rows of a source, read from disk one at a time.

    Attributes:
        table: has one entry per row.
        column_names: of all rows; a JSON row may lack some of them.
        decode: turns an entry of the table into a row.
    """

    table: Dataset
    column_names: list[str]
    decode: Callable[[Any], dict[str, Any]] = dict

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.table)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...

    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        """Return one row, or several."""
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        return self.decode(self.table[index])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield all rows; faster than one index at a time."""
        return map(self.decode, self.table)


def json_rows(lines: Dataset) -> Rows:
    """Return the rows of JSON files; they stay text until they are read.

    A table would give each column one type, so texts would become numbers, lists or dates, and
    large integers floats.

    Args:
        lines: of the files, in the column `LINE`. They are JSON lines, a list of objects, or an
            object of lists, the columns.

    Raises:
        ValueError: a line is not a JSON object.
    """
    first = next((entry[LINE] for entry in lines if entry[LINE].strip()), "")
    unit = "line"
    if not _is_object(first):
        unit = "item"
        items = _items("\n".join(entry[LINE] for entry in lines))
        lines = Dataset.from_dict({LINE: [json.dumps(item) for item in items]})
    kept: list[int] = []
    names: dict[str, None] = {}
    for number, entry in enumerate(lines):
        if entry[LINE].strip():
            names |= dict.fromkeys(_checked_row(entry[LINE], f"{unit} {number + 1}"))
            kept.append(number)
    table = lines if len(kept) == len(lines) else lines.select(kept)
    return Rows(table, list(names), _decode)


def join_rows(parts: Iterable[tuple[Rows, range]]) -> Rows:
    """Return some rows of one source, or of several parts of it.

    Args:
        parts: rows, and which of them to take; at least one, decoded in the same way.
    """
    taken = list(parts)
    table = concatenate_datasets([rows.table.select(some) for rows, some in taken])
    names = dict.fromkeys(name for rows, _ in taken for name in rows.column_names)
    return Rows(table, list(names), taken[0][0].decode)


def _decode(entry: Any) -> dict[str, Any]:
    row: dict[str, Any] = json.loads(entry[LINE])
    return row


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _checked_row(line: str, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
        if _SURROGATE.search(line):  # half of a pair could not be written to any log
            json.dumps(row, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not valid JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{place} is {row!r:.100}, not a JSON object")
    return row


def _items(text: str) -> Iterator[Any]:
    """Yield the items of one JSON value, or of several, one after the other."""
    decoder, position = json.JSONDecoder(), 0
    while rest := _NOT_SPACE.search(text, position):
        try:
            value, position = decoder.raw_decode(text, rest.start())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"it is not valid JSON: {error}") from error
        if isinstance(value, list):
            yield from value
        elif _has_columns(value):
            yield from (
                dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)
            )
        else:
            yield value


def _has_columns(value: Any) -> bool:
    """Whether a value is an object of lists of the same length."""
    if not isinstance(value, dict) or not all(isinstance(item, list) for item in value.values()):
        return False
    return len({len(column) for column in value.values()}) == 1
