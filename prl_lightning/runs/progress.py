"""Progress bars for sampling and rewarding, in the style of the Trainer's own bar."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar
from tqdm.auto import tqdm

from prl_lightning.sampling import Progress

# A task that ends earlier shows no bar.
DELAY_SECONDS = 3.0

# Takes the number of newly finished items and a note, such as the speed.
Advance = Callable[[int, str], None]


def is_interactive(stream: TextIO) -> bool:
    """Whether a person sees the stream: a terminal (TTY) or a notebook, not a file or pipe."""
    return stream.isatty() or "ipykernel" in sys.modules


def hide_library_bars() -> None:
    """Disable the bars of ``datasets`` and ``transformers`` if stderr is not interactive.

    The whole process is affected: neither library has a narrower switch.
    """
    if is_interactive(sys.stderr):
        return
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()


def hide_trainer_bar(trainer: Trainer) -> None:
    """Disable the Trainer's bar if stdout is not interactive: it would fill a log file.

    Args:
        trainer: must not have started its bar yet.
    """
    bar = trainer.progress_bar_callback
    if bar is not None and not is_interactive(sys.stdout):
        bar.disable()


@contextmanager
def progress_bar(trainer: Trainer, label: str, total: int) -> Iterator[Advance]:
    """Show a bar that disappears at the end: a line of the RichProgressBar, or a tqdm bar.

    A tqdm bar below a rich display would print a new line for each update.

    Args:
        trainer: only its first rank shows the bar, and only if it has a progress bar itself.
        label: of the bar.
        total: number of items.

    Yields:
        A function to call with the number of newly finished items and a note, from any thread.
    """
    bar = trainer.progress_bar_callback
    if bar is None or not trainer.is_global_zero:
        yield lambda count, note: None
    elif isinstance(bar, RichProgressBar) and bar.progress and bar.progress.live.is_started:
        with _rich_line(bar, bar.progress, label, total) as advance:
            yield advance
    else:
        hidden = not is_interactive(sys.stderr)
        with tqdm(total=total, desc=label, delay=DELAY_SECONDS, leave=False, disable=hidden) as own:

            def advance(count: int, note: str) -> None:
                own.set_postfix_str(note, refresh=False)
                own.update(count)

            yield advance


@contextmanager
def _rich_line(bar: RichProgressBar, progress: Any, label: str, total: int) -> Iterator[Advance]:
    # A label keeps its task. Removing a task would shift the indices by which Lightning finds its
    # own tasks.
    known = [task.id for task in progress.tasks if task.fields.get("label") == label]
    task = known[0] if known else progress.add_task(label, total=total, visible=False, label=label)
    progress.reset(task, total=total, visible=False, description=label)
    start = time.monotonic()

    def advance(count: int, note: str) -> None:
        is_long = time.monotonic() - start >= DELAY_SECONDS
        text = f"{label} {note}".rstrip()
        progress.update(task, advance=count, description=text, visible=is_long)
        bar.refresh()

    try:
        yield advance
    finally:
        progress.update(task, visible=False)
        bar.refresh()


@contextmanager
def sampling_bar(trainer: Trainer, prompts: int) -> Iterator[Progress]:
    """Show a bar of finished prompts with tokens per second.

    Args:
        trainer: see ``progress_bar``.
        prompts: number of prompts.

    Yields:
        The ``on_progress`` of ``Sampler.generate``.
    """
    start, sampled = time.monotonic(), 0
    with progress_bar(trainer, "Sampling", prompts) as advance:

        def on_progress(finished: Mapping[int, Any], tokens: int) -> None:
            nonlocal sampled
            sampled += tokens
            speed = sampled / max(time.monotonic() - start, 1e-9)
            advance(len(finished), f"{sampled:,} tokens, {speed:,.0f} tokens/s")

        yield on_progress
