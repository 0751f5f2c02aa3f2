"""Whether a person looks on, and no bars of other libraries where nobody does."""

from __future__ import annotations

import sys
from typing import TextIO


def is_interactive(stream: TextIO) -> bool:
    """Whether what is written there is seen at once: in a terminal or a notebook, not in a file.

    Args:
        stream: standard output, or that for errors.
    """
    return stream.isatty() or "ipykernel" in sys.modules


def hide_bars_from_files() -> None:
    """Keep the bars of ``datasets`` and ``transformers`` out of files and pipes.

    They would write them there as well. It holds for the process: both have no narrower switch.
    """
    if is_interactive(sys.stderr):
        return
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()
