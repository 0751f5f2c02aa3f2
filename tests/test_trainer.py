"""A checkpoint is whole or not there, and the newest whole one is found."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.data import DataLoader

import prl_lightning.trainer
from prl_lightning.trainer import PRLTrainer, last_checkpoint

pytestmark = pytest.mark.process


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.log("val/held/mean@8", 0.5)
        return (self.weight - 1) ** 2

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fitted(folder: Path, **options: Any) -> PRLTrainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "default_root_dir": folder,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = PRLTrainer(**(settings | options))
    trainer.fit(Model(), DataLoader([1.0, 2.0]))
    return trainer


def write_folder(checkpoint: dict[str, Any], path: Path, **_: Any) -> None:
    """As strategies that shard do, with the parts of so many ranks."""
    path.mkdir(parents=True, exist_ok=True)
    for rank in range(checkpoint.get("ranks", 2)):
        (path / f"__{rank}_0.distcp").write_bytes(b"part")
    (path / ".metadata").write_bytes(b"metadata")
    torch.save({"step": checkpoint["global_step"]}, path / "meta.pt")


@pytest.fixture(params=["file", "folder"])
def trainer(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> PRLTrainer:
    trainer = fitted(tmp_path)
    if request.param == "folder":
        monkeypatch.setattr(trainer.strategy, "save_checkpoint", write_folder)
    return trainer


def step_of(path: Path) -> int:
    if path.is_dir():
        return int(torch.load(path / "meta.pt", weights_only=True)["step"])
    return int(torch.load(path, weights_only=True)["global_step"])


def set_step(trainer: PRLTrainer, step: int) -> None:
    progress = trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress
    progress.optimizer.step.total.completed = step


def full_disk(trainer: PRLTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    save: Callable[..., None] = trainer.strategy.save_checkpoint

    def half(checkpoint: dict[str, Any], path: Path, **options: Any) -> None:
        save(checkpoint, path, **options)
        if path.is_dir():
            (path / ".metadata").unlink()
        else:
            os.truncate(path, path.stat().st_size // 2)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(trainer.strategy, "save_checkpoint", half)


def test_a_full_disk_leaves_the_checkpoint_before(
    trainer: PRLTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run" / "last.ckpt"
    trainer.save_checkpoint(path)
    full_disk(trainer, monkeypatch)
    set_step(trainer, 7)
    with pytest.raises(OSError, match="No space left"):
        trainer.save_checkpoint(path)
    assert step_of(path) == 2
    assert list(path.parent.iterdir()) == [path]


def test_the_new_checkpoint_replaces_the_old_and_what_a_kill_has_left(
    trainer: PRLTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run" / "last.ckpt"
    trainer.save_checkpoint(path)
    left = path.with_name(".part-last.ckpt")
    if path.is_dir():
        left.mkdir()
        (left / "__5_0.distcp").write_bytes(b"of a run with more ranks")
    else:
        left.write_bytes(b"half")
    set_step(trainer, 7)
    trainer.save_checkpoint(path)
    assert step_of(path) == 7
    assert list(path.parent.iterdir()) == [path]
    if path.is_dir():
        assert not (path / "__5_0.distcp").exists()


def test_a_file_replaces_a_folder_and_a_folder_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, path = fitted(tmp_path), tmp_path / "run" / "last.ckpt"
    to_file = trainer.strategy.save_checkpoint
    for step, save in ((3, to_file), (4, write_folder), (5, to_file)):
        monkeypatch.setattr(trainer.strategy, "save_checkpoint", save)
        set_step(trainer, step)
        trainer.save_checkpoint(path)
        assert step_of(path) == step
        assert list(path.parent.iterdir()) == [path]


def test_at_every_moment_of_a_save_there_is_a_whole_checkpoint(
    trainer: PRLTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a kill would leave, before and after each rename and removal."""
    path = tmp_path / "checkpoints" / "last.ckpt"
    seen: list[int] = []

    def look() -> None:
        found = last_checkpoint(trainer)
        seen.append(-1 if found is None else step_of(found))

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            look()
            result = function(*args)
            look()
            return result

        return call

    trainer.save_checkpoint(path)
    set_step(trainer, 7)
    for name in ("rename", "replace"):
        monkeypatch.setattr(Path, name, watched(getattr(Path, name)))
    monkeypatch.setattr(prl_lightning.trainer, "_remove", watched(prl_lightning.trainer._remove))
    trainer.save_checkpoint(path)
    # Folders are told apart by their time: while both are there, either will do.
    assert set(seen) == {2, 7}
    assert seen == sorted(seen)


def test_values_alone_are_read_from_a_checkpoint_unless_asked_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning decides by where the checkpoint is, where it is not told."""
    trainer, path = fitted(tmp_path), tmp_path / "last.ckpt"
    trainer.save_checkpoint(path)
    load, asked = trainer.strategy.load_checkpoint, []

    def noted(path: Any, weights_only: bool | None = None) -> Any:
        asked.append(weights_only)
        return load(path, weights_only=weights_only)

    monkeypatch.setattr(trainer.strategy, "load_checkpoint", noted)
    for option in (None, True, False):
        trainer.fit(Model(), DataLoader([1.0]), ckpt_path=path, weights_only=option)
    assert asked == [True, True, False]


def test_python_has_the_defaults_of_the_command() -> None:
    trainer = PRLTrainer(accelerator="cpu", logger=False)
    assert trainer.num_sanity_val_steps == float("inf")
    assert trainer.log_every_n_steps == 1
    assert not trainer._accelerator_connector.use_distributed_sampler
    assert PRLTrainer(accelerator="cpu", num_sanity_val_steps=2).num_sanity_val_steps == 2


def test_the_newest_whole_one_of_all_runs_is_last(tmp_path: Path) -> None:
    own = tmp_path / "own"
    trainer = fitted(
        tmp_path,
        enable_checkpointing=True,
        callbacks=[ModelCheckpoint(own, save_last=True, save_top_k=0)],
    )
    (own / "last.ckpt").unlink()
    assert last_checkpoint(trainer) is None
    paths = [
        tmp_path / "version_0" / "checkpoints" / "last.ckpt",
        tmp_path / "version_10" / "checkpoints" / "last-v1.ckpt",
        tmp_path / "checkpoints" / "last.ckpt",
        own / "last.ckpt",
    ]
    for time, path in enumerate(paths):
        trainer.save_checkpoint(path)
        os.utime(path, (time, time))
        assert last_checkpoint(trainer) == path
    for name in ("epoch=9.ckpt", ".part-last.ckpt"):
        (own / name).write_bytes((own / "last.ckpt").read_bytes())
    assert last_checkpoint(trainer) == paths[-1]
    os.truncate(paths[-1], paths[-1].stat().st_size // 2)
    assert last_checkpoint(trainer) == paths[-2]
    folder = tmp_path / "version_11" / "checkpoints" / "last.ckpt"
    write_folder({"global_step": 3}, folder)
    assert last_checkpoint(trainer) == folder
    (folder / "meta.pt").unlink()
    assert last_checkpoint(trainer) == paths[-2]
    for path in paths:
        path.unlink()
    assert last_checkpoint(trainer) == own / "epoch=9.ckpt"


@pytest.mark.parametrize("own", [None, "own"])
def test_a_metric_in_the_name_makes_folders_that_are_searched(
    own: str | None, tmp_path: Path
) -> None:
    class Last(ModelCheckpoint):
        CHECKPOINT_NAME_LAST = "last-{val/held/mean@8:.1f}"

    name = "{epoch}-{val/held/mean@8:.1f}"
    folder = tmp_path / (own or "checkpoints")
    dirpath = own and str(folder)
    for some, expected in (
        (ModelCheckpoint(dirpath, name), "epoch=0-val/held/mean@8=0.5.ckpt"),
        (Last(dirpath, name, save_last=True), "last-val/held/mean@8=0.5.ckpt"),
    ):
        trainer = fitted(tmp_path, enable_checkpointing=True, callbacks=[some])
        other = folder / "other" / "version_0" / "checkpoints" / "last.ckpt"
        trainer.save_checkpoint(other)
        assert last_checkpoint(trainer) == folder / expected
        other.unlink()


def test_strategies_are_known_by_name_from_python() -> None:
    """In a process that has imported nothing of the command line."""
    code = (
        "from prl_lightning.trainer import PRLTrainer\n"
        "trainer = PRLTrainer(strategy='fsdp2', accelerator='cpu', devices=1, logger=False)\n"
        "print(type(trainer.strategy).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "FSDP2Strategy"


TWO_DEVICES = {"accelerator": "cpu", "devices": 2, "logger": False}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}


@pytest.mark.parametrize(
    ("strategy", "argument", "variables", "is_refused"),
    [
        ("ddp", "-c", {}, True), ("fsdp2", "-", {}, True), ("ddp", "", {}, True),
        ("ddp_notebook", "-c", {}, False), ("ddp", __file__, {}, False),
        ("ddp", "-", TORCHRUN, False),
    ],
)  # fmt: skip
def test_a_program_that_cannot_be_started_again_is_refused(
    strategy: str, argument: str, variables: dict[str, str], is_refused: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """``sys.argv[0]`` as Python sets it for ``-c``, for ``-``, without arguments and for a file."""
    monkeypatch.setitem(sys.modules, "__main__", ModuleType("__main__"))
    monkeypatch.setattr(sys, "argv", [argument])
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    refusal = pytest.raises(ValueError, match=r"trainer\.devices=2.*stdin")
    with refusal if is_refused else nullcontext():
        PRLTrainer(strategy=strategy, **TWO_DEVICES)


def test_a_program_from_stdin_is_refused_before_a_second_one_starts() -> None:
    code = f"from prl_lightning.trainer import PRLTrainer\nPRLTrainer(**{TWO_DEVICES})"
    done = subprocess.run([sys.executable, "-"], input=code, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].startswith("ValueError: trainer.devices=2, but")


@pytest.mark.parametrize("weights_only", [None, False, True])
def test_a_checkpoint_has_what_was_asked_for_and_nothing_is_said_of_defaults(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, weights_only: bool | None
) -> None:
    trainer = fitted(tmp_path)
    with caplog.at_level("INFO", logger="lightning"):
        trainer.save_checkpoint(tmp_path / "some.ckpt", weights_only)
    assert "weights_only" not in caplog.text
    saved = torch.load(tmp_path / "some.ckpt", weights_only=True)
    assert ("optimizer_states" in saved) == (not weights_only)


class Wrapper(torch.optim.SGD):
    """An optimizer whose state is a tensor subclass, as torchao's."""

    def step(self, closure: Any = None) -> Any:
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            before = state.get("moment", TwoTensor(torch.zeros(()), torch.zeros(())))
            state["moment"] = before + 1
        return super().step(closure)


def test_a_state_of_tensor_subclasses_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Model, "configure_optimizers", lambda self: Wrapper(self.parameters(), lr=0.1)
    )
    fitted(tmp_path).save_checkpoint(tmp_path / "one.ckpt")
    resumed = PRLTrainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, default_root_dir=tmp_path,
    )  # fmt: skip
    with torch.serialization.safe_globals([TwoTensor]):
        resumed.fit(Model(), DataLoader([1.0, 2.0]), ckpt_path=tmp_path / "one.ckpt")
    (state,) = resumed.optimizers[0].state.values()
    assert isinstance(state["moment"], TwoTensor)
    assert state["moment"].a == 4  # two steps before and two after


def test_out_of_memory_says_what_to_lower(tmp_path: Path) -> None:
    class Full(Callback):
        def on_train_start(self, *_: Any) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    with pytest.raises(torch.OutOfMemoryError) as error:
        fitted(tmp_path, callbacks=[Full()])
    assert "trainer.accumulate_grad_batches" in error.value.__notes__[0]


def test_a_program_sees_no_warnings_that_are_not_about_it() -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        PRLTrainer(logger=False, accelerator="cpu")
        warnings.warn("Found 3 module(s) in eval mode at the start of training", stacklevel=1)
        warnings.warn("something of the run", stacklevel=1)
    assert [str(one.message) for one in seen] == ["something of the run"]
