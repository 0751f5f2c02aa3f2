"""Lightning's own callbacks and options, as docs/callbacks.md lists them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from lightning.pytorch.tuner import Tuner

from prl_lightning.callbacks import RolloutCallback
from prl_lightning.checks.contradictions import ConfigurationError
from prl_lightning.data import PromptDataModule
from prl_lightning.module import PRLModule
from prl_lightning.sampling import HFSampler
from prl_lightning.trainer import PRLTrainer
from prl_lightning.types import RolloutBatch
from sample_rewards import even_digits
from tiny_runs import ARITHMETIC, fit, metrics_of, tiny_overrides, write_prompts
from trainer_runs import train

pytestmark = pytest.mark.process

BEST = ARITHMETIC.parent / "callbacks" / "best.yaml"


def completions(batch: RolloutBatch) -> int:
    """Of a micro-batch, for ThroughputMonitor."""
    return len(batch.completion_ids)


# With arguments that show what each has done. EarlyStopping ends the run at its first look.
WORKING: dict[str, dict[str, Any]] = {
    "EarlyStopping": {"monitor": "val/heldout/mean@8", "mode": "max", "stopping_threshold": -1},
    "LearningRateMonitor": {},
    "Timer": {"duration": "01:00:00:00", "interval": "step"},
    "DeviceStatsMonitor": {"cpu_stats": True},
    "ThroughputMonitor": {"batch_size_fn": f"{__name__}.completions"},
    "EMAWeightAveraging": {"decay": 0.5},
    "OnExceptionCheckpoint": {"dirpath": "never"},
    "RichProgressBar": {},
    "ModelSummary": {},
}


def test_callbacks_work_at_once(tied_model: str, tmp_path: Path) -> None:
    callbacks = [{"class_path": name, "init_args": args} for name, args in WORKING.items()]
    profiler = {"dirpath": str(tmp_path), "filename": "profile"}
    fit(
        *tiny_overrides(tied_model, tmp_path),
        f"--config={BEST}",
        f"--evaluation={{samples: 8, pass_at: [8], sets: {{heldout: {tmp_path}/heldout.jsonl}}}}",
        f"--trainer.callbacks+={json.dumps(callbacks)}",
        f"--trainer.profiler={json.dumps({'class_path': 'SimpleProfiler', 'init_args': profiler})}",
        "--trainer.detect_anomaly=true",
        "--trainer.enable_progress_bar=true",
        "--trainer.max_epochs=5",
        "--trainer.check_val_every_n_epoch=2",
        "--model.optimizer.init_args.lr=0.01",
    )
    metrics = metrics_of(tmp_path)
    assert len(metrics["train/loss"]) == 2  # stopped by EarlyStopping
    assert metrics["lr-AdamW"][-1] == 0.01
    assert metrics["train/samples"][-1] == 2 * 4 * 4
    assert "DeviceStatsMonitor.on_train_batch_end/cpu_percent" in metrics
    checkpoints = tmp_path / "run" / "version_0" / "checkpoints"
    assert all(path.is_file() for path in checkpoints.iterdir())  # no folder of a slash
    (best,) = checkpoints.glob("best-*.ckpt")
    named = re.fullmatch(r"best-epoch=1-pass@8=(\d\.\d{3})\.ckpt", best.name)
    assert named
    assert float(named[1]) == pytest.approx(metrics["val/heldout/pass@8"][-1], abs=1e-3)
    assert "optimizer_step" in (tmp_path / "fit-profile.txt").read_text()
    assert not Path("never").exists()


def test_an_exception_leaves_a_checkpoint_that_is_read_safely(
    tied_model: str, tmp_path: Path
) -> None:
    class Fails(Callback):
        def on_train_epoch_end(self, *_: Any) -> None:
            raise RuntimeError("in the middle of the night")

    saves = OnExceptionCheckpoint(tmp_path)
    with pytest.raises(RuntimeError, match="night"):
        train(tied_model, tmp_path, saves, Fails(), trainer={"enable_checkpointing": True})
    saved = torch.load(tmp_path / "on_exception.ckpt", weights_only=True)
    assert saved["global_step"] == 1


def test_the_tuner_is_refused_before_the_policy_is_loaded(tied_model: str, tmp_path: Path) -> None:
    prompts = str(write_prompts(tmp_path / "train.jsonl"))
    data = PromptDataModule(tied_model, prompts, prompts_per_epoch=4)
    rollout = RolloutCallback([even_digits], HFSampler(), max_new_tokens=8)
    trainer = PRLTrainer(accelerator="cpu", logger=False, max_epochs=1, callbacks=[rollout])
    with pytest.raises(ConfigurationError, match=r"LearningRateFinder.*model\.optimizer"):
        Tuner(trainer).lr_find(PRLModule("never/loaded"), datamodule=data)
