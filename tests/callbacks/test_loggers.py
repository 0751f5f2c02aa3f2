"""Scalars of a run under the documented names, read back from each of Lightning's loggers."""

from __future__ import annotations

import json
import re
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tiny_runs import ARITHMETIC, fit, metrics_of, tiny_overrides

pytestmark = pytest.mark.process

NAMES = (
    "rollout/reward",
    "rollout/reward_failures/even_digits",
    "train/loss",
    "train/kl_ref",
    "val/tiny/mean@4",
    "val/tiny/pass@2",
    "val/tiny/length",
)
Curves = dict[str, list[float]]
WANDB_BLOCK = 32768


@pytest.fixture(scope="module")
def run(tied_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run with all loggers; the command adds metrics.csv."""
    pytest.importorskip("wandb", reason="needs the extra loggers")
    pytest.importorskip("mlflow", reason="needs the extra loggers")
    folder = tmp_path_factory.mktemp("loggers")
    mlflow = {"tracking_uri": f"file:{folder}/mlruns", "artifact_location": f"{folder}/artifacts"}
    options = {
        "TensorBoardLogger": {"save_dir": f"{folder}/board"},
        "WandbLogger": {"save_dir": f"{folder}/wandb", "offline": True},
        "MLFlowLogger": mlflow,
    }
    loggers = [{"class_path": name, "init_args": args} for name, args in options.items()]
    (folder / "wandb").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a database needs all of mlflow
        fit(*tiny_overrides(tied_model, folder), f"--trainer.logger={json.dumps(loggers)}")
        import wandb

        wandb.finish()
    return folder


def of_tensorboard(run: Path) -> Curves:
    events = EventAccumulator(str(next((run / "board").rglob("events.*")).parent))
    events.Reload()
    names = events.Tags()["scalars"]
    return {name: [event.value for event in events.Scalars(name)] for name in names}


def records(file: Path) -> Iterator[bytes]:
    """Yield the records of wandb's file: LevelDB's log format, blocks after a header."""
    data = file.read_bytes()
    at, record = 7, b""
    while at + 7 <= len(data):
        if WANDB_BLOCK - at % WANDB_BLOCK < 7:  # too little for a header: padding
            at += WANDB_BLOCK - at % WANDB_BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        if at + 7 + length > len(data):  # still being written
            return
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def of_wandb(run: Path) -> Curves:
    from wandb.proto.wandb_internal_pb2 import Record

    file = next((run / "wandb").rglob("*.wandb"))
    # wandb.finish() may return before the last records are in the file.
    found: list[Record] = []
    while not any(record.HasField("exit") for record in found):
        time.sleep(0.1)
        found = [Record.FromString(data) for data in records(file)]
    curves: Curves = {}
    for record in found:
        for item in record.history.item:
            name = item.key or "/".join(item.nested_key)
            curves.setdefault(name, []).append(json.loads(item.value_json))
    return curves


def of_mlflow(run: Path) -> Curves:
    """MLflow refuses @ in a name, so Lightning removes it."""
    curves: Curves = {}
    for name in NAMES:
        file = next((run / "mlruns").rglob(f"metrics/{name.replace('@', '')}"))
        curves[name] = [float(line.split()[1]) for line in file.read_text().splitlines()]
    return curves


@pytest.mark.parametrize("read", [metrics_of, of_tensorboard, of_wandb, of_mlflow])
def test_scalars_have_their_documented_names(read: Callable[[Path], Curves], run: Path) -> None:
    expected = metrics_of(run)
    found = read(run)
    for name in NAMES:
        assert found[name] == pytest.approx(expected[name], rel=1e-6), name


def test_completions_are_in_each_that_has_tables(run: Path) -> None:
    tables = list((run / "wandb").rglob("completions*.table.json"))
    assert len(tables) == 2  # of the first epoch and the last
    assert len(list((run / "artifacts").rglob("epoch=*.json"))) == 2


def test_the_logger_for_trackio_that_the_documentation_shows(
    tied_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    pytest.importorskip("trackio", reason="pip install trackio; no extra has it")
    page = (ARITHMETIC.parents[1] / "docs" / "callbacks.md").read_text()
    (program,) = re.findall(r"```python\n(import trackio.*?)```", page, re.DOTALL)
    (tmp_path / "my_loggers.py").write_text(program)
    monkeypatch.syspath_prepend(tmp_path)
    logger = {"class_path": "my_loggers.TrackioLogger", "init_args": {"project": "a", "run": "b"}}
    fit(*tiny_overrides(tied_model, tmp_path), f"--trainer.logger={json.dumps(logger)}")
    from trackio.sqlite_storage import SQLiteStorage

    rows, expected = SQLiteStorage.get_logs("a", "b"), metrics_of(tmp_path)
    for name in NAMES:
        found = [row[name] for row in rows if name in row]
        assert found == pytest.approx(expected[name], rel=1e-6), name
