"""The folder of a run: claimed by one run alone, and found again from its checkpoints."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import count
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from prl_lightning.runs.files import METRICS

# The metrics of a run that is continued in its own folder, until they are copied.
EARLIER_METRICS = "metrics-earlier.csv"


def claim_folders(loggers: Iterable[Logger]) -> None:
    """Create the folders of loggers that number their runs; loggers of one root share a number.

    Lightning reads the next number and creates the folder later, so that two runs can get the same.

    Args:
        loggers: of the Trainer, on its first rank.
    """
    versions: dict[str, int] = {}
    for logger in loggers:
        if not isinstance(logger, CSVLogger | TensorBoardLogger) or logger._version is not None:
            continue
        if logger.root_dir not in versions and "://" not in logger.root_dir:
            versions[logger.root_dir] = _claim(logger)
        logger._version = versions.get(logger.root_dir)


def _claim(logger: CSVLogger | TensorBoardLogger) -> int:
    for version in count(logger._get_next_version()):
        logger._version = version
        try:
            Path(logger.log_dir).mkdir(parents=True)
        except FileExistsError:
            continue
        break
    return version


def keep_metrics(loggers: Iterable[Logger], is_new: bool) -> None:
    """Rename an existing ``metrics.csv``, which CSVLogger would delete; RunSummary copies its rows.

    A copy that was interrupted starts again from the renamed file.

    Args:
        loggers: of the Trainer, on its first rank.
        is_new: the run continues none, so that the files are of no use.
    """
    for logger in loggers:
        if isinstance(logger, CSVLogger) and logger._experiment is None:
            metrics = Path(logger.log_dir) / METRICS
            earlier = metrics.with_name(EARLIER_METRICS)
            if is_new:
                earlier.unlink(missing_ok=True)
            elif metrics.is_file() and not earlier.exists():
                metrics.rename(earlier)


def folder_of(checkpoint: Path) -> Path:
    """Return the run folder of a checkpoint, which may be in a folder within ``checkpoints``."""
    parents = [parent for parent in checkpoint.parents if parent.name == "checkpoints"]
    return (parents[0] if parents else checkpoint.parent).parent
