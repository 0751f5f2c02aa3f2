"""Bars for what takes long beside the Trainer's own, in the manner of that one."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar
from tqdm.auto import tqdm

from prl_lightning.sampling import Progress
from prl_lightning.runs.terminal import is_interactive

# What is quicker shows no bar.
SECONDS_BEFORE_A_BAR = 3.0

# Called with how many more are done, and a note such as their speed.
Advance = Callable[[int, str], None]


def hide_bar_from_files(trainer: Trainer) -> None:
    """Turn the Trainer's bar off where nobody looks at it: it would fill a file, or a pipe.

    Args:
        trainer: before it starts its bar.
    """
    bar = trainer.progress_bar_callback
    if bar is not None and not is_interactive(sys.stdout):
        bar.disable()


@contextmanager
def progress_bar(trainer: Trainer, what: str, total: int) -> Iterator[Advance]:
    """One bar, gone at the end: a line of the Trainer's RichProgressBar, or else of tqdm's.

    A bar of tqdm's under a display of rich's would print a line for each of its updates.

    Args:
        trainer: whose first rank alone shows it, if it shows any bar.
        what: goes on.
        total: how many there are to do.

    Yields:
        To be called with what is done, from any thread.
    """
    bar = trainer.progress_bar_callback
    if bar is None or not trainer.is_global_zero:
        yield _show_nothing
    elif isinstance(bar, RichProgressBar) and bar.progress and bar.progress.live.is_started:
        with _line_of(bar, bar.progress, what, total) as advance:
            yield advance
    else:
        hidden = not is_interactive(sys.stderr)
        with tqdm(
            total=total, desc=what, delay=SECONDS_BEFORE_A_BAR, leave=False, disable=hidden
        ) as shown:

            def advance(count: int, note: str = "") -> None:
                shown.set_postfix_str(note, refresh=False)
                shown.update(count)

            yield advance


def _show_nothing(count: int, note: str) -> None:
    pass


@contextmanager
def _line_of(bar: RichProgressBar, progress: Any, what: str, total: int) -> Iterator[Advance]:
    # Of one kind one, shown again each time: removed, it would change the places of others, by
    # which the bar finds its own.
    known = [task.id for task in progress.tasks if task.fields.get("what") == what]
    task = known[0] if known else progress.add_task(what, total=total, visible=False, what=what)
    progress.reset(task, total=total, visible=False, description=what)
    start = time.monotonic()

    def advance(count: int, note: str = "") -> None:
        is_long = time.monotonic() - start >= SECONDS_BEFORE_A_BAR
        text = f"{what} {note}".rstrip()
        progress.update(task, advance=count, description=text, visible=is_long)
        bar.refresh()

    try:
        yield advance
    finally:
        progress.update(task, visible=False)
        bar.refresh()


@contextmanager
def sampling_bar(trainer: Trainer, prompts: int) -> Iterator[Progress]:
    """A bar of prompts done, with tokens a second.

    Args:
        trainer: see ``progress_bar``.
        prompts: to sample.

    Yields:
        For ``Sampler.generate``.
    """
    start, drawn = time.monotonic(), 0
    with progress_bar(trainer, "Sampling", prompts) as advance:

        def on_progress(done: int, tokens: int) -> None:
            nonlocal drawn
            drawn += tokens
            speed = drawn / max(time.monotonic() - start, 1e-9)
            advance(done, f"{speed:,.0f} tokens/s")

        yield on_progress
