"""Progress bars in the style of the Trainer's own, and lines where no person sees a bar."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from time import monotonic
from typing import Any, TextIO

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar
from tqdm.auto import tqdm

from prl_lightning.sampling import Progress

# A task that ends earlier shows no bar.
DELAY_SECONDS = 3.0
LINE_SECONDS = 60.0  # between two lines in a file or pipe
REFRESH_SECONDS = 0.1  # engines report each step

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
        with bar_or_lines(label, total) as advance:
            yield advance


@contextmanager
def bar_or_lines(label: str, total: int) -> Iterator[Advance]:
    """Show a tqdm bar that disappears at the end, or where nobody sees it a line a minute.

    Args:
        label: of the bar.
        total: number of items.

    Yields:
        See ``progress_bar``.
    """
    if not is_interactive(sys.stderr):
        yield _lines(label, total)
        return
    with tqdm(total=total, desc=label, delay=DELAY_SECONDS, leave=False) as bar:

        def advance(count: int, note: str) -> None:
            bar.set_postfix_str(note, refresh=False)
            bar.update(count)

        yield advance


def print_iteration(trainer: Trainer) -> None:
    """Print a line about a finished iteration if stdout is not interactive; a collective.

    Args:
        trainer: in ``on_train_epoch_end``; prints on its first rank, if it has a progress bar.
    """
    values = {name: float(value) for name, value in trainer.callback_metrics.items()}
    is_shown = trainer.progress_bar_callback is not None and trainer.is_global_zero
    if not is_shown or is_interactive(sys.stdout):
        return
    last = f" of {trainer.max_epochs}" if (trainer.max_epochs or -1) > 0 else ""
    formats = {
        "rollout/reward": "reward {:.3f}",
        "train/kl_ref": "kl_ref {:.4f}",
        "rollout/groups_without_signal": "{:.0%} of groups without signal",
        "rollout/completion_length": "{:.0f} tokens a completion",
        "rollout/sampling_seconds": "sampled in {:.0f} s",
        "train/seconds": "trained in {:.0f} s",
        "pass@1": "pass@1 {:.3f}",
    }
    texts = [text.format(values[name]) for name, text in formats.items() if name in values]
    print(f"Iteration {trainer.current_epoch + 1}{last}: {', '.join(texts)}", flush=True)


def _lines(label: str, total: int) -> Advance:
    """Print a line a minute; a log file must not be filled by a bar."""
    start = printed = monotonic()
    done = 0

    def advance(count: int, note: str) -> None:
        nonlocal done, printed
        done += count
        now = monotonic()
        if now - printed >= LINE_SECONDS:
            printed = now
            text = f"{label}: {done} of {total} after {now - start:.0f} s {note}".rstrip()
            print(text, file=sys.stderr, flush=True)

    return advance


@contextmanager
def _rich_line(bar: RichProgressBar, progress: Any, label: str, total: int) -> Iterator[Advance]:
    # A label keeps its task. Removing a task would shift the indices by which Lightning finds its
    # own tasks.
    known = [task.id for task in progress.tasks if task.fields.get("label") == label]
    task = known[0] if known else progress.add_task(label, total=total, visible=False, label=label)
    progress.reset(task, total=total, visible=False, description=label)
    start = monotonic()

    def advance(count: int, note: str) -> None:
        is_long = monotonic() - start >= DELAY_SECONDS
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
    """Show a bar of finished prompts, with the tokens sampled so far and their speed.

    A prompt is finished with its last completion, which may be near the end for all prompts.

    Args:
        trainer: see ``progress_bar``.
        prompts: number of prompts.

    Yields:
        The ``on_progress`` of ``Sampler.generate``.
    """
    start, shown, sampled = monotonic(), -REFRESH_SECONDS, 0
    with progress_bar(trainer, "Sampling", prompts) as advance:

        def on_progress(finished: Mapping[int, Any], tokens: int) -> None:
            nonlocal sampled, shown
            sampled += tokens
            now = monotonic()
            if finished or now - shown >= REFRESH_SECONDS:
                shown = now
                speed = sampled / max(now - start, 1e-9)
                advance(len(finished), f"{sampled:,} tokens, {speed:,.0f} tokens/s")

        yield on_progress
