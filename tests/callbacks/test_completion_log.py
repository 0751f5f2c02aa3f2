"""The stored completions against the method's equations, and tables in the loggers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from prl_lightning.callbacks import CompletionLog
from prl_lightning.callbacks.completion_log import SHOWN, log_table
from prl_lightning.cli import main
from prl_lightning.runs.tables import read_table
from tiny_runs import ARITHMETIC, fit, metrics_of, tiny_overrides
from trainer_runs import TRAIN_ALONE

pytestmark = pytest.mark.process

BETA = 0.01
NAMES = ["epoch=00000.parquet", "epoch=00002.parquet"]
HOSTILE = "a|b `c`\n</script><script>alert(1)</script>"
ROWS = [
    {"prompt": "1+1?", "completion": text, "reward": 1.0, "outcome_advantage": 0.5, "length": 3}
    for text in ("2", HOSTILE)
]


def fitted(model: str, folder: Path, *args: str) -> Path:
    """Three epochs, of which the first and the last are stored, at a high learning rate."""
    folder.mkdir(exist_ok=True)
    overrides = [*tiny_overrides(model, folder), "--completions.groups=2"]
    fit(*overrides, "--trainer.max_epochs=3", "--model.optimizer.init_args.lr=1e-2", *args)
    return folder


@pytest.fixture(scope="module")
def run(tied_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fitted(tied_model, tmp_path_factory.mktemp("completions"))


def stored(folder: Path, epoch: int) -> list[dict[str, Any]]:
    return read_table(folder / f"run/version_0/completions/epoch={epoch:05d}.parquet")


def with_tokens(folder: Path, epoch: int) -> list[dict[str, Any]]:
    return [row for row in stored(folder, epoch) if row["tokens"] is not None]


def test_a_fit_stores_the_first_and_the_last_epoch(run: Path) -> None:
    folder = run / "run" / "version_0" / "completions"
    assert sorted(file.name for file in folder.iterdir()) == NAMES
    rows = stored(run, 0)
    assert [row["group"] for row in rows] == [group for group in range(4) for _ in range(4)]
    assert [row["group"] for row in with_tokens(run, 0)] == [0] * 4 + [1] * 4
    mean = sum(row["reward"] for row in rows) / 16
    assert metrics_of(run)["rollout/reward"][0] == pytest.approx(mean)
    # The reference is the initial policy, so there are no process rewards yet.
    for row in with_tokens(run, 0):
        assert len(row["tokens"]) == row["length"] == len(row["policy_logprobs"])
        assert row["policy_logprobs"] == pytest.approx(row["ref_logprobs"], abs=1e-6)
        assert row["process_rewards"] == pytest.approx([row["reward"]] * row["length"], abs=1e-6)
        assert row["advantages"] == pytest.approx([row["outcome_advantage"]] * row["length"])
        assert re.sub(r"<\w+>", "", "".join(row["tokens"])) == row["completion"]


def test_credit_is_the_sum_over_the_rest_of_the_completion(run: Path) -> None:
    """Eq. 5.4 written out; the advantage of a token also answers for its own log-ratio."""
    moved = 0.0
    for row in with_tokens(run, 2):
        pairs = zip(row["policy_logprobs"], row["ref_logprobs"], strict=True)
        ratios = [policy - ref for policy, ref in pairs]
        for token, credit in enumerate(row["process_rewards"]):
            later = sum(ratios[token + 1 :])
            assert credit == pytest.approx(row["reward"] - BETA * later, abs=1e-5)
            assert row["outcome_advantage"] - row["advantages"][token] == pytest.approx(
                BETA * (ratios[token] + later), abs=1e-5
            )
        moved += sum(map(abs, ratios))
    assert moved > 1


def test_storing_does_not_change_the_run(run: Path, tied_model: str, tmp_path: Path) -> None:
    none = fitted(tied_model, tmp_path, *TRAIN_ALONE)
    assert not (none / "run" / "version_0" / "completions").exists()
    assert metrics_of(none)["train/loss"] == metrics_of(run)["train/loss"]
    with pytest.raises(ValueError, match=r"completions\.every_n_epochs=-1"):
        CompletionLog(every_n_epochs=-1)


def test_an_outcome_advantage_per_token_is_stored(tied_model: str, tmp_path: Path) -> None:
    """With the KL inside the reward it is the whole advantage."""
    stores = [*TRAIN_ALONE[:-1], "--model.objective.kl=reward_step"]
    fitted(tied_model, tmp_path, *stores)
    rows = with_tokens(tmp_path, 2)
    for row in rows:
        assert row["outcome_advantages"] == pytest.approx(row["advantages"])
    assert any(len(set(row["outcome_advantages"])) > 1 for row in rows)


def test_predict_writes_every_group_with_its_advantages(tied_model: str, tmp_path: Path) -> None:
    masked = "--model.objective.mask_truncated=true"  # which only training does
    main(["predict", "--config", str(ARITHMETIC), *tiny_overrides(tied_model, tmp_path), masked])
    rows = stored(tmp_path, 0)
    assert not all(row["finished"] for row in rows)
    assert all(value < 0 for row in with_tokens(tmp_path, 0) for value in row["policy_logprobs"])
    assert [row["group"] for row in rows] == [group for group in range(5) for _ in range(4)]
    rewards = torch.tensor([row["reward"] for row in rows]).view(5, 4)
    advantages = torch.tensor([row["outcome_advantage"] for row in rows]).view(5, 4)
    assert (advantages.sum(1).abs() < 1e-5).all()
    assert torch.equal(advantages > 0, rewards > rewards.mean(1, keepdim=True))


# Loggers


def test_tensorboard_is_the_default_and_gets_a_text(run: Path) -> None:
    events = EventAccumulator(str(run / "run" / "version_0"))
    events.Reload()
    tags = events.Tags()
    assert {"train/loss", "rollout/reward", "val/tiny/mean@4"} <= set(tags["scalars"])
    rewards = [event.value for event in events.Scalars("rollout/reward")]
    assert rewards == pytest.approx(metrics_of(run)["rollout/reward"])
    assert "completions/text_summary" in tags["tensors"]


def test_model_text_cannot_leave_its_cell(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="run")
    log_table(logger, "epoch=00000", ROWS, step=3)
    logger.finalize("success")
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    tensor = events.Tensors("completions/text_summary")[0]
    assert tensor.step == 3
    lines = tensor.tensor_proto.string_val[0].decode().splitlines()
    assert lines[0] == f"| {' | '.join(SHOWN)} |"
    assert len(lines) == 4
    cell = lines[3].split(" | ")[1]
    assert json.loads(cell.strip("`")) == HOSTILE
    assert "|" not in cell
    assert cell.count("`") == 2


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_other_loggers_get_a_table(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = pytest.importorskip(name, reason="needs the extra loggers")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a database needs all of mlflow
    if name == "wandb":
        logger: Any = WandbLogger(save_dir=str(tmp_path), offline=True)
    else:
        logger = MLFlowLogger(
            tracking_uri=f"file:{tmp_path}/mlruns", artifact_location=str(tmp_path / "artifacts")
        )
    logger.log_metrics({"train/loss": 0.5}, step=1)
    log_table(logger, "epoch=00000", ROWS, step=1)
    if name == "wandb":
        module.finish()
    pattern = "completions*.table.json" if name == "wandb" else "epoch=00000.json"
    table: dict[str, Any] = json.loads(next(tmp_path.rglob(pattern)).read_text())
    assert table["columns"] == list(SHOWN)
    assert table["data"][1][1] == HOSTILE


def test_a_logger_without_tables_gets_nothing(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    log_table(logger, "epoch=00000", ROWS, step=1)
    assert not (Path(logger.log_dir) / "metrics.csv").exists()
