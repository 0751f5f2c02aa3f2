"""Bars for people: beside the Trainer's own and in its manner, and none where nobody looks."""

from __future__ import annotations

import io
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

from prl_lightning.cli import _command_line
from prl_lightning.runs import progress
from prl_lightning.runs.progress import progress_bar, sampling_bar
from ranks import SUPPORT
from tiny_runs import QUICKSTART, tiny_overrides

BARS = {"rich": RichProgressBar, "tqdm": TQDMProgressBar}


class Terminal(io.StringIO):
    """What a terminal is shown."""

    def isatty(self) -> bool:
        return True


def show_in_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Called by the test itself: pytest has streams of its own for each of its phases."""
    shown = Terminal()
    monkeypatch.setattr(sys, "stdout", shown)
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setattr(progress, "SECONDS_BEFORE_A_BAR", 0.0)
    monkeypatch.setattr(progress, "tqdm", partial(progress.tqdm, mininterval=0.0))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "xterm")
    return shown


def command(model: str, folder: Path, bar: str) -> list[str]:
    return [
        "fit",
        f"--config={QUICKSTART}",
        *tiny_overrides(model, folder),
        "--trainer.enable_progress_bar=true",
        f"--trainer.callbacks={BARS[bar].__name__}",
    ]


@pytest.mark.parametrize("bar", BARS)
def test_a_fit_in_a_terminal(
    bar: str, tied_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One display: a bar of tqdm's under one of rich's would print a line for each update."""
    terminal = show_in_terminal(monkeypatch)
    one_by_one = "--rollout.sampler.init_args.batch_size=1"
    trainer = _command_line([*command(tied_model, tmp_path, bar), one_by_one]).trainer
    text = terminal.getvalue()
    for words in ("Epoch 0", "Sampling", "/4", " tokens/s"):
        assert words in text, words
    assert ("Sampling: " in text, "• " in text) == (bar == "tqdm", bar == "rich")
    assert {"reward", "train/kl_ref", "pass@1"} <= set(trainer.progress_bar_metrics)


def test_nothing_is_drawn_into_a_pipe(tied_model: str, tmp_path: Path) -> None:
    """Neither by the Trainer nor by `datasets` and `transformers`."""
    for bar in BARS:
        (tmp_path / bar).mkdir()
        words = command(tied_model, tmp_path / bar, bar)
        run = [sys.executable, "-m", "prl_lightning", *words]
        # As bytes: of a text the carriage returns would be translated.
        done = subprocess.run(run, capture_output=True, cwd=SUPPORT)
        assert done.returncode == 0, done.stderr
        written = [done.stdout.decode(), done.stderr.decode()]
        assert "Done: 2 updates." in written[0]
        for text in written:
            assert not [sign for sign in ("\r", "%|", "•", "Epoch 0", "it/s") if sign in text], text


def test_a_line_of_rich_comes_late_and_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    show_in_terminal(monkeypatch)
    bar = RichProgressBar()
    trainer = Trainer(callbacks=[bar], logger=False, accelerator="cpu")
    bar.on_train_start(trainer, LightningModule())
    assert bar.progress is not None
    for delay, visible in ((60.0, False), (0.0, True)):
        monkeypatch.setattr(progress, "SECONDS_BEFORE_A_BAR", delay)
        with sampling_bar(trainer, prompts=8) as on_progress:
            on_progress(2, 30)
            (task,) = bar.progress.tasks  # the same one again
            assert (task.completed, task.total, task.visible) == (2, 8, visible)
            assert task.description.endswith(" tokens/s")
        assert not task.visible
    bar.teardown(trainer, LightningModule(), "fit")


def test_ranks_beside_the_first_and_a_trainer_without_a_bar_show_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = show_in_terminal(monkeypatch)
    trainer = Trainer(enable_progress_bar=False, logger=False, accelerator="cpu")
    with progress_bar(trainer, "Sampling", 8) as advance:
        advance(8, "")
    trainer = Trainer(callbacks=[TQDMProgressBar()], logger=False, accelerator="cpu")
    with progress_bar(trainer, "Rewarding", 8) as advance:
        advance(8, "")
    monkeypatch.setattr(Trainer, "is_global_zero", False)
    with progress_bar(trainer, "Sampling", 8) as advance:
        advance(8, "")
    assert "Rewarding" in terminal.getvalue()
    assert "Sampling" not in terminal.getvalue()
