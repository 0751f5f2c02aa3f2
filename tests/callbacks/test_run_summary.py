"""The rows of metrics.csv stay where a run goes on in its own folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger

from prl_lightning.callbacks import RunSummary
from prl_lightning.runs.files import metrics_rows
from prl_lightning.runs.folders import EARLIER_METRICS
from prl_lightning.trainer import PRLTrainer


class Model(BoringModel):
    """Log a metric in training, and others where it is evaluated."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("seen", float(self.trainer.global_step), on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("tested", 1.0)


def trainer(folder: Path, epochs: int = 2, version: Any = "mine", prefix: str = "") -> PRLTrainer:
    return PRLTrainer(
        accelerator="cpu",
        max_epochs=epochs,
        limit_train_batches=2,
        limit_val_batches=0,
        limit_test_batches=1,
        logger=CSVLogger(folder, "run", version, prefix, flush_logs_every_n_steps=1),
        callbacks=[RunSummary()],
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )


def fit(folder: Path, checkpoint: Path | None = None, **options: Any) -> Path:
    """The path of the last checkpoint, beside the run."""
    run = trainer(folder, **options)
    run.fit(Model(), ckpt_path=checkpoint)
    run.save_checkpoint(folder / "end.ckpt")
    return folder / "end.ckpt"


def rows(folder: Path, version: str = "mine") -> list[tuple[int, dict[str, float]]]:
    return list(metrics_rows(folder / "run" / version / "metrics.csv"))


@pytest.mark.parametrize("prefix", ["", "own"])
def test_a_run_that_is_continued_in_its_own_folder_has_all_rows(
    prefix: str, tmp_path: Path
) -> None:
    fit(tmp_path / "whole", epochs=4, prefix=prefix)
    saved = fit(tmp_path, prefix=prefix)
    fit(tmp_path, saved, epochs=4, prefix=prefix)
    assert len(rows(tmp_path)) == 4
    assert rows(tmp_path) == rows(tmp_path / "whole")


def test_rows_after_the_checkpoint_are_those_of_the_new_start(tmp_path: Path) -> None:
    saved = fit(tmp_path).rename(tmp_path / "of_two.ckpt")
    fit(tmp_path, saved, epochs=4)
    fit(tmp_path, saved, epochs=3)
    assert [step for step, _ in rows(tmp_path)] == [1, 3, 5]


@pytest.mark.parametrize("copied", [None, "seen,step\n", "epoch,seen,step\n0,0.5,1\n"])
def test_a_copy_that_was_killed_starts_again(copied: str | None, tmp_path: Path) -> None:
    saved, folder = fit(tmp_path), tmp_path / "run" / "mine"
    before = rows(tmp_path)
    (folder / "metrics.csv").rename(folder / EARLIER_METRICS)
    if copied is not None:
        (folder / "metrics.csv").write_text(copied)
    fit(tmp_path, saved, epochs=3)
    assert rows(tmp_path)[:-1] == before
    assert not (folder / EARLIER_METRICS).exists()


def test_an_evaluation_keeps_the_rows_of_the_training(tmp_path: Path) -> None:
    saved = fit(tmp_path)
    before = rows(tmp_path)
    trainer(tmp_path).test(Model(), ckpt_path=saved, verbose=False)
    *kept, (_, tested) = rows(tmp_path)
    assert kept == before
    assert tested["tested"] == 1


def test_a_trainer_that_goes_on_keeps_its_open_file(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.fit(Model())
    before = rows(tmp_path)
    run.test(Model(), verbose=False)
    assert rows(tmp_path)[:-1] == before
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["mine"]


def test_a_new_run_does_not_take_over_what_another_has_left(tmp_path: Path) -> None:
    fit(tmp_path, epochs=3)
    folder = tmp_path / "run" / "mine"
    (folder / EARLIER_METRICS).write_text("seen,step\n9.0,0\n")
    saved = fit(tmp_path, epochs=1)
    fit(tmp_path, saved, epochs=2)
    assert [step for step, _ in rows(tmp_path)] == [1, 3]
    assert not (folder / EARLIER_METRICS).exists()


def test_runs_that_read_the_same_number_have_folders_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As two do that start at the same moment."""
    monkeypatch.setattr(CSVLogger, "_get_next_version", lambda logger: 0)
    for epochs in (1, 2):
        fit(tmp_path, epochs=epochs, version=None)
    assert [len(rows(tmp_path, f"version_{number}")) for number in (0, 1)] == [1, 2]
