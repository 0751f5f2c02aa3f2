"""Write down what a benchmark has measured."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch


def publish(result: dict[str, Any], out: Path | None) -> None:
    """Print a result as one JSON line, with the class of the machine, for people who compare.

    Args:
        result: what was measured.
        out: a file to write it to as well; its folder is made.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = f"{os.cpu_count()} cores, {memory:.0f} GiB, {platform.machine()}"
    result = {"machine": f"{cores}, torch {torch.__version__}", **result}
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))
