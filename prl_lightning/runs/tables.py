"""Parquet files that are whole or not there."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def write_table(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows beside, then rename.

    Args:
        file: its folder is made.
        rows: at least one, all with the same columns.
    """
    import pyarrow
    import pyarrow.parquet

    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".part-{os.getpid()}-{file.name}")
    try:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), part)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def read_table(file: Path, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Read what ``write_table`` has written.

    Args:
        file: to read.
        columns: to read; all of them by default.
    """
    import pyarrow.parquet

    # Of an open file: a path with "=" in it would be read as a partition.
    with file.open("rb") as opened:
        rows: list[dict[str, Any]] = pyarrow.parquet.read_table(opened, columns=columns).to_pylist()
    return rows
