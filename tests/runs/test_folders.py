"""Each run has a folder of its own, and its folder is found from its checkpoints."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from prl_lightning.runs.folders import claim_folders, folder_of


def test_runs_that_start_together_do_not_share_a_folder(tmp_path: Path) -> None:
    runs, rounds = 8, 5
    together = Barrier(runs)

    def start(_: int) -> list[int | str]:
        found = []
        for _ in range(rounds):
            loggers: list[Logger] = [
                TensorBoardLogger(tmp_path, name="run"),
                CSVLogger(tmp_path, name="run"),
            ]
            together.wait()
            claim_folders(loggers)
            board, csv = (logger.version for logger in loggers)
            assert board == csv
            found.append(csv)
        return found

    with ThreadPoolExecutor(runs) as threads:
        versions = [version for own in threads.map(start, range(runs)) for version in own]
    assert sorted(versions) == list(range(runs * rounds))
    assert len(list((tmp_path / "run").iterdir())) == runs * rounds


def test_a_folder_that_is_named_is_left_alone(tmp_path: Path) -> None:
    named: list[Logger] = [CSVLogger(tmp_path, version="mine"), TensorBoardLogger(tmp_path, "", 3)]
    claim_folders(named)
    assert [logger.version for logger in named] == ["mine", 3]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "checkpoint", ["checkpoints/last.ckpt", "checkpoints/a/b@8=1.ckpt", "own/last.ckpt"]
)
def test_a_checkpoint_leads_to_its_run(checkpoint: str) -> None:
    assert folder_of(Path("runs/version_0") / checkpoint) == Path("runs/version_0")
