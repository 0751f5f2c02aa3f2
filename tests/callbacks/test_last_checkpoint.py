"""LastCheckpoint: what it saves can be continued from, and loggers upload it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.loggers.utilities import _scan_checkpoints

from prl_lightning.callbacks import LastCheckpoint
from tiny_runs import fit, tiny_overrides
from trainer_runs import train

pytestmark = pytest.mark.process


class Uploads(DummyLogger):
    """What WandbLogger and MLFlowLogger do with ``log_model``, without their servers."""

    def __init__(self, log_model: Literal["all", True]) -> None:
        super().__init__()
        self.log_model = log_model
        self.callbacks: list[ModelCheckpoint] = []
        self.times: dict[str, float] = {}
        self.uploaded: list[tuple[str, int]] = []

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        self.callbacks.append(checkpoint_callback)
        if self.log_model == "all":
            self.finalize("success")

    def finalize(self, status: str) -> None:
        for callback in self.callbacks:
            for time, path, _, _ in _scan_checkpoints(callback, self.times):
                step = torch.load(path, weights_only=True)["global_step"]
                self.uploaded.append((Path(path).name, step))
                self.times[path] = time


def fit_boring(folder: Path, **options: Any) -> None:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "max_epochs": 3,
        "limit_train_batches": 2,
        "limit_val_batches": 0,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
    }
    Trainer(**(settings | options)).fit(BoringModel())


@pytest.mark.parametrize(
    ("log_model", "steps"), [(True, [6]), ("all", [4, 6])], ids=["at the end", "each"]
)
def test_a_logger_with_log_model_uploads_the_last_checkpoint(
    log_model: Any, steps: list[int], tmp_path: Path
) -> None:
    logger = Uploads(log_model)
    callbacks = [LastCheckpoint(every_n_epochs=2, dirpath=str(tmp_path / "own"))]
    fit_boring(tmp_path, logger=logger, callbacks=callbacks)
    assert logger.uploaded == [("last.ckpt", step) for step in steps]


def test_an_end_that_is_saved_already_is_not_saved_again(tmp_path: Path) -> None:
    logger = Uploads("all")
    fit_boring(tmp_path, logger=logger, callbacks=[LastCheckpoint(1, str(tmp_path / "own"))])
    assert [step for _, step in logger.uploaded] == [2, 4, 6]


def test_a_smoke_test_saves_nothing(tied_model: str, tmp_path: Path) -> None:
    fit_boring(tmp_path / "run", fast_dev_run=True, callbacks=[LastCheckpoint()])
    export = "--trainer.callbacks+=prl_lightning.callbacks.HFExport"
    fit(*tiny_overrides(tied_model, tmp_path), export, "--trainer.fast_dev_run=true")
    assert not (tmp_path / "run").exists()


def test_a_run_that_ends_with_the_average_saves_the_policy_before(
    tied_model: str, tmp_path: Path
) -> None:
    saves = {"enable_checkpointing": True}
    last = LastCheckpoint(every_n_epochs=10, dirpath=str(tmp_path))
    module, watch = train(
        tied_model, tmp_path, EMAWeightAveraging(decay=0.5), last, learning_rate=1.0, trainer=saves
    )
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    name = "policy.causal_lm.model.norm.weight"
    average, policy = checkpoint["state_dict"][name], checkpoint["current_model_state"][name]
    assert torch.equal(average, module.state_dict()[name])
    # The average begins as the policy after the first update, and the second has half the weight.
    first = watch.weights[1][name.removeprefix("policy.")]
    torch.testing.assert_close(average, (first + policy) / 2)
    assert not torch.equal(average, policy)
