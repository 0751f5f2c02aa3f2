"""A run without a CSVLogger still writes its files."""

from __future__ import annotations

from pathlib import Path

import pytest
from lightning.pytorch.loggers import TensorBoardLogger

from prl_lightning.callbacks import CompletionLog, EvaluationLog
from prl_lightning.evaluation import Evaluation
from prl_lightning.rewards import RewardLimits
from prl_lightning.runs.files import completion_files, read_evaluations
from prl_lightning.runs.tables import read_table
from sample_rewards import raises_on_odd
from tiny_runs import write_prompts
from trainer_runs import train

pytestmark = pytest.mark.process


@pytest.mark.parametrize("has_logger", [True, False], ids=["TensorBoard", "no logger"])
def test_the_files_go_to_the_loggers_folder_or_the_root(
    has_logger: bool, tied_model: str, tmp_path: Path
) -> None:
    board = TensorBoardLogger(tmp_path / "board")
    root, held = tmp_path / "root", str(write_prompts(tmp_path / "held.jsonl", 3))
    with pytest.warns(UserWarning, match=r"limits\.failure_value=0"):
        train(
            tied_model,
            tmp_path,
            CompletionLog(groups=1),
            EvaluationLog(),
            rewards=[raises_on_odd],
            rollout={"limits": RewardLimits(max_failures=1.0)},
            epochs=1,
            trainer={"logger": board if has_logger else False, "default_root_dir": root},
            evaluation=Evaluation({"held": held}, samples=2, pass_at=(2,)),
        )
    folder = Path(board.log_dir) if has_logger else root
    failures = (folder / "reward_failures.jsonl").read_text().splitlines()
    assert failures
    assert all("raises_on_odd" in line for line in failures)
    evaluations, _ = read_evaluations(folder / "evaluations.jsonl")
    assert [evaluation["step"] for evaluation in evaluations] == [1]
    (file,) = completion_files(folder)
    assert len(read_table(file)) == 16
    assert root.exists() != has_logger
