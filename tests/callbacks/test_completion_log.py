"""The log of completions against what the loss has, and in every logger that can show it."""

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
from tiny_runs import QUICKSTART, fit, metrics_of, tiny_overrides

HOSTILE = "a|b `c`\n</script><script>alert(1)</script>"
ROWS = [
    {"prompt": "1+1?", "completion": text, "reward": 1.0, "outcome_advantage": 0.5, "length": 3}
    for text in ("2", HOSTILE)
]


def test_a_fit_keeps_the_first_and_the_last_epoch(tied_model: str, tmp_path: Path) -> None:
    fit(*tiny_overrides(tied_model, tmp_path), "--trainer.max_epochs=3", "--completions.groups=2")
    folder = tmp_path / "run" / "version_0" / "completions"
    names = ["epoch=00000.parquet", "epoch=00002.parquet"]
    assert sorted(file.name for file in folder.iterdir()) == names
    whole = read_table(folder / names[0])
    assert [row["group"] for row in whole] == [group for group in range(4) for _ in range(4)]
    rows = [row for row in whole if row["tokens"] is not None]
    assert [row["group"] for row in rows] == [0] * 4 + [1] * 4
    rewards = [row["reward"] for row in whole]
    assert metrics_of(tmp_path)["rollout/reward"][0] == pytest.approx(sum(rewards) / 16)
    # The reference is the policy as it starts, so nothing but the outcome is a reward yet.
    for row in rows:
        assert len(row["tokens"]) == row["length"] == len(row["policy_logprobs"])
        assert row["policy_logprobs"] == pytest.approx(row["ref_logprobs"], abs=1e-6)
        assert row["process_rewards"] == pytest.approx([row["reward"]] * row["length"], abs=1e-6)
        assert row["advantages"] == pytest.approx([row["outcome_advantage"]] * row["length"])
        assert re.sub(r"<\w+>", "", "".join(row["tokens"])) == row["completion"]


def test_credit_is_the_sum_over_the_rest_of_the_completion(tied_model: str, tmp_path: Path) -> None:
    """Eq. 5.4 written out; the advantage of a token also answers for its own log-ratio."""
    overrides = tiny_overrides(tied_model, tmp_path)
    fit(*overrides, "--trainer.max_epochs=3", "--model.optimizer.init_args.lr=1e-2")
    beta = 0.01
    moved = 0.0
    for row in read_table(tmp_path / "run/version_0/completions/epoch=00002.parquet"):
        ratios = [
            policy - ref
            for policy, ref in zip(row["policy_logprobs"], row["ref_logprobs"], strict=True)
        ]
        for token, credit in enumerate(row["process_rewards"]):
            assert credit == pytest.approx(
                row["reward"] - beta * sum(ratios[token + 1 :]), abs=1e-5
            )
        falls = [row["outcome_advantage"] - advantage for advantage in row["advantages"]]
        steps = [falls[t] - falls[t + 1] for t in range(len(falls) - 1)]
        assert steps == pytest.approx([beta * ratio for ratio in ratios[:-1]], abs=1e-5)
        moved += sum(map(abs, ratios))
    assert moved > 1


def test_an_outcome_of_each_token_is_kept(tied_model: str, tmp_path: Path) -> None:
    """With the KL inside the reward it is all that the advantage is."""
    overrides = tiny_overrides(tied_model, tmp_path)
    fit(
        *overrides,
        "--trainer.max_epochs=3",
        "--model.objective.kl=reward_step",
        "--model.optimizer.init_args.lr=1e-2",
    )
    rows = read_table(tmp_path / "run/version_0/completions/epoch=00002.parquet")
    for row in rows:
        assert row["outcome_advantages"] == pytest.approx(row["advantages"])
    assert any(len(set(row["outcome_advantages"])) > 1 for row in rows)


def test_predict_writes_every_group_with_its_advantages(tied_model: str, tmp_path: Path) -> None:
    main(["predict", "--config", str(QUICKSTART), *tiny_overrides(tied_model, tmp_path)])
    rows = read_table(tmp_path / "run" / "version_0" / "completions" / "epoch=00000.parquet")
    assert [row["group"] for row in rows] == [group for group in range(5) for _ in range(4)]
    rewards = torch.tensor([row["reward"] for row in rows]).view(5, 4)
    advantages = torch.tensor([row["outcome_advantage"] for row in rows]).view(5, 4)
    assert (advantages.sum(1).abs() < 1e-5).all()
    assert torch.equal(advantages > 0, rewards > rewards.mean(1, keepdim=True))


def test_no_epoch_is_kept_where_none_is_asked_for(tied_model: str, tmp_path: Path) -> None:
    fit(*tiny_overrides(tied_model, tmp_path), "--completions.every_n_epochs=0")
    assert not (tmp_path / "run" / "version_0" / "completions").exists()
    with pytest.raises(ValueError, match=r"completions\.every_n_epochs=-1"):
        CompletionLog(every_n_epochs=-1)


def test_logging_does_not_change_the_run(tied_model: str, tmp_path: Path) -> None:
    curves = []
    for every in (0, 1):
        folder = tmp_path / str(every)
        folder.mkdir()
        overrides = tiny_overrides(tied_model, folder)
        fit(*overrides, f"--completions.every_n_epochs={every}")
        curves.append(metrics_of(folder)["train/loss"])
    assert curves[0] == curves[1]


def test_tensorboard_is_the_default_and_gets_a_text(tied_model: str, tmp_path: Path) -> None:
    fit(*tiny_overrides(tied_model, tmp_path))
    events = EventAccumulator(str(tmp_path / "run" / "version_0"))
    events.Reload()
    tags = events.Tags()
    assert {"train/loss", "rollout/reward", "val/tiny/mean@4"} <= set(tags["scalars"])
    rewards = [event.value for event in events.Scalars("rollout/reward")]
    assert rewards == pytest.approx(metrics_of(tmp_path)["rollout/reward"])
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


def test_weights_and_biases_gets_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="needs the extra loggers")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=str(tmp_path), offline=True)
    logger.log_metrics({"train/loss": 0.5}, step=1)
    log_table(logger, "epoch=00000", ROWS, step=1)
    logger.experiment.finish()
    file = next(tmp_path.rglob("completions*.table.json"))
    table: dict[str, Any] = json.loads(file.read_text())
    assert table["columns"] == list(SHOWN)
    assert table["data"][1][1] == HOSTILE


def test_mlflow_gets_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="needs the extra loggers")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a database needs all of mlflow
    logger = MLFlowLogger(
        tracking_uri=f"file:{tmp_path}/mlruns", artifact_location=str(tmp_path / "artifacts")
    )
    logger.log_metrics({"train/loss": 0.5}, step=1)
    log_table(logger, "epoch=00000", ROWS, step=1)
    file = next(tmp_path.rglob("epoch=00000.json"))
    table: dict[str, Any] = json.loads(file.read_text())
    assert table["columns"] == list(SHOWN)
    assert table["data"][1][1] == HOSTILE


def test_a_logger_without_tables_gets_nothing(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    log_table(logger, "epoch=00000", ROWS, step=1)
    assert not (Path(logger.log_dir) / "metrics.csv").exists()
