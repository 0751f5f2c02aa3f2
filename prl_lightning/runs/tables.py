"""Parquet files, and files that are written completely or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Replace a file by a new one at once: after an error or a kill, the old one is still there.

    Args:
        file: its folder is created.

    Yields:
        A temporary path in the same folder, to write to.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".part-{os.getpid()}-{file.name}")
    try:
        yield part
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def write_table(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows to a Parquet file, completely or not at all.

    Args:
        file: its folder is created.
        rows: at least one, all with the same columns.
    """
    with replacing(file) as part:
        pq.write_table(pa.Table.from_pylist(list(rows)), part)


def read_table(file: Path, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Read the rows of a Parquet file.

    Args:
        file: to read.
        columns: to read; all of them by default.
    """
    # pyarrow would take "=" in a path for a partition, so it gets an open file.
    with file.open("rb") as opened:
        rows: list[dict[str, Any]] = pq.read_table(opened, columns=columns).to_pylist()
    return rows
