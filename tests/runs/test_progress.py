"""Progress bars in the style of the Trainer's own, and none if no person sees them."""

from __future__ import annotations

import io
import re
import sys
from functools import partial
from pathlib import Path

import datasets
import pytest
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from transformers.utils import logging

from prl_lightning.cli.lightning import command_line
from prl_lightning.runs import progress
from prl_lightning.runs.progress import progress_bar, sampling_bar
from tiny_runs import ARITHMETIC, tiny_overrides

pytestmark = pytest.mark.process

BARS = {"rich": RichProgressBar, "tqdm": TQDMProgressBar}


class Stream(io.StringIO):
    """A terminal, or a pipe."""

    def __init__(self, is_terminal: bool) -> None:
        super().__init__()
        self.is_terminal = is_terminal

    def isatty(self) -> bool:
        return self.is_terminal


def show_in(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> Stream:
    """Called by the test itself: pytest replaces the streams for each of its phases."""
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "DELAY_SECONDS", 0.0)
    monkeypatch.setattr(progress, "tqdm", partial(progress.tqdm, mininterval=0.0))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "xterm")
    return stream


def fit(model: str, folder: Path, bar: str) -> Trainer:
    return command_line(
        [
            "fit",
            f"--config={ARITHMETIC}",
            *tiny_overrides(model, folder),
            "--trainer.enable_progress_bar=true",
            f"--trainer.callbacks={BARS[bar].__name__}",
            "--trainer.max_epochs=1",
            "--rollout.sampler.init_args.batch_size=1",
        ]
    ).trainer


@pytest.mark.parametrize("bar", BARS)
def test_a_fit_in_a_terminal(
    bar: str, tied_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One display: a tqdm bar below a rich one would print a line for each update."""
    terminal = show_in(Stream(is_terminal=True), monkeypatch)
    trainer = fit(tied_model, tmp_path, bar)
    text = terminal.getvalue()
    for words in ("Epoch 0", "Sampling", "/4", " tokens/s"):
        assert words in text, words
    assert ("Sampling: " in text, "• " in text) == (bar == "tqdm", bar == "rich")
    assert {"reward", "train/kl_ref", "pass@1"} <= set(trainer.progress_bar_metrics)


@pytest.mark.parametrize("bar", BARS)
def test_no_bar_is_written_to_a_pipe(
    bar: str, tied_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither by the Trainer nor by `datasets` and `transformers`."""
    datasets.enable_progress_bars()
    logging.enable_progress_bar()
    pipe = show_in(Stream(is_terminal=False), monkeypatch)
    fit(tied_model, tmp_path, bar)
    text = pipe.getvalue()
    assert "Done: 1 update." in text
    assert not [sign for sign in ("\r", "%|", "•", "Epoch 0", "it/s") if sign in text], text
    assert "FLOPs" not in text
    # But a line for the iteration.
    assert re.search(r"^Iteration 1 of 1: reward 0\.\d+, kl_ref .* trained in", text, re.MULTILINE)


def test_a_file_gets_a_line_a_minute_while_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    log = show_in(Stream(is_terminal=False), monkeypatch)
    now = 0.0
    monkeypatch.setattr(progress, "monotonic", lambda: now)
    trainer = Trainer(callbacks=[TQDMProgressBar()], logger=False, accelerator="cpu")
    with sampling_bar(trainer, prompts=8) as on_progress:
        for now in range(0, 181, 10):
            on_progress({now: []} if now % 60 == 50 else {}, 100)
    assert log.getvalue().splitlines() == [
        "Sampling: 1 of 8 after 60 s 700 tokens, 12 tokens/s",
        "Sampling: 2 of 8 after 120 s 1,300 tokens, 11 tokens/s",
        "Sampling: 3 of 8 after 180 s 1,900 tokens, 11 tokens/s",
    ]


def test_the_bar_counts_tokens_before_the_first_prompt_is_finished(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = show_in(Stream(is_terminal=True), monkeypatch)
    now = 0.0
    monkeypatch.setattr(progress, "monotonic", lambda: now)
    trainer = Trainer(callbacks=[TQDMProgressBar()], logger=False, accelerator="cpu")
    with sampling_bar(trainer, prompts=8) as on_progress:
        now = 2.0
        on_progress({}, 500)
        on_progress({}, 500)  # at once: it is counted but not shown
        on_progress({0: []}, 0)
    text = terminal.getvalue()
    assert "500 tokens, 250 tokens/s" in text
    assert "1/8" in text
    assert "1,000 tokens, 500 tokens/s" in text


def test_a_line_of_rich_appears_late_and_disappears(monkeypatch: pytest.MonkeyPatch) -> None:
    show_in(Stream(is_terminal=True), monkeypatch)
    bar = RichProgressBar()
    trainer = Trainer(callbacks=[bar], logger=False, accelerator="cpu")
    bar.on_train_start(trainer, LightningModule())
    assert bar.progress is not None
    for delay, visible in ((1e9, False), (0.0, True)):
        monkeypatch.setattr(progress, "DELAY_SECONDS", delay)
        with sampling_bar(trainer, prompts=8) as on_progress:
            on_progress({0: [], 1: []}, 30)
            (task,) = bar.progress.tasks  # the same one again
            assert (task.completed, task.total, task.visible) == (2, 8, visible)
            assert task.description.endswith(" tokens/s")
        assert not task.visible
    bar.teardown(trainer, LightningModule(), "fit")


def test_other_ranks_and_a_trainer_without_a_bar_show_none(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = show_in(Stream(is_terminal=True), monkeypatch)

    def show(label: str, is_first: bool, has_bar: bool) -> None:
        monkeypatch.setattr(Trainer, "is_global_zero", is_first)
        bars = [TQDMProgressBar()] if has_bar else []
        trainer = Trainer(
            callbacks=bars, enable_progress_bar=has_bar, logger=False, accelerator="cpu"
        )
        with progress_bar(trainer, label, 8) as advance:
            advance(8, "")

    show("without a bar", is_first=True, has_bar=False)
    show("shown", is_first=True, has_bar=True)
    show("other rank", is_first=False, has_bar=True)
    text = terminal.getvalue()
    assert "shown" in text
    assert "without a bar" not in text
    assert "other rank" not in text
