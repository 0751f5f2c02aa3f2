"""A module is made again from its checkpoint alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.parsing import clean_namespace
from torch.distributed.checkpoint.state_dict_saver import save

from prl_lightning.module import PRLModule
from prl_lightning.objective import Objective
from prl_lightning.references import Reference
from prl_lightning.trainer import PRLTrainer
from tiny_runs import fit, tiny_overrides

pytestmark = pytest.mark.process

LORA = {"r": 2, "target_modules": "all-linear"}


def saved(module: PRLModule, file: Path) -> Path:
    """A checkpoint whose trained weights are not those that the module starts from."""
    module.configure_model()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter += 1
    trainer = PRLTrainer(logger=False, accelerator="cpu", enable_progress_bar=False)
    trainer.strategy.connect(module)
    clean_namespace(module.hparams)  # as a run does: it drops what cannot be pickled
    trainer.save_checkpoint(file)
    return file


def as_folder(file: Path) -> Path:
    """The checkpoint in the form of Lightning's ModelParallelStrategy."""
    folder, checkpoint = file.with_suffix(".folder"), torch.load(file, weights_only=True)
    save({"state_dict": checkpoint.pop("state_dict")}, checkpoint_id=folder, no_dist=True)
    torch.save(checkpoint, folder / "meta.pt")
    return folder


def assert_same(ours: PRLModule, theirs: PRLModule) -> None:
    expected = ours.state_dict()
    loaded = theirs.state_dict()
    assert expected.keys() == loaded.keys()
    assert all(torch.equal(loaded[name], weight) for name, weight in expected.items())


@pytest.mark.parametrize("form", [Path, as_folder])
def test_a_module_of_a_program_needs_nothing_else(
    form: Callable[[Path], Path], tied_model: str, tmp_path: Path
) -> None:
    objective = Objective(
        references={"uniform": Reference(kind="uniform", beta=0.1, discount=0.5)}, steps=4
    )
    module = PRLModule(tied_model, objective, lora=LORA)
    loaded = PRLModule.load_from_checkpoint(form(saved(module, tmp_path / "a.ckpt")))
    assert_same(module, loaded)
    assert loaded.objective == objective
    assert loaded.lora == LORA
    optimizer = loaded.configure_optimizers()
    assert (type(optimizer), optimizer.defaults["lr"]) == (torch.optim.AdamW, 1e-6)


def test_a_function_is_asked_for_only_when_it_is_needed(tied_model: str, tmp_path: Path) -> None:
    """A lambda is no plain data. AdamW in place of it would be a silent change of the training."""
    module = PRLModule(tied_model, optimizer=lambda params: torch.optim.SGD(params, lr=0.5))
    file = saved(module, tmp_path / "a.ckpt")
    loaded = PRLModule.load_from_checkpoint(file)
    assert_same(module, loaded)
    with pytest.raises(ValueError, match=r"model\.optimizer.*optimizer="):
        loaded.configure_optimizers()
    given = PRLModule.load_from_checkpoint(file, optimizer=module.optimizer)
    assert given.configure_optimizers().defaults["lr"] == 0.5


def test_a_run_of_the_command_needs_nothing_else_and_obeys_its_configuration(
    tied_model: str, tmp_path: Path
) -> None:
    run = [*tiny_overrides(tied_model, tmp_path), "--model.optimizer.init_args.lr=0.01"]
    fit(*run, "--model.objective.beta=0.5", "--trainer.max_epochs=1")
    checkpoint = tmp_path / "run" / "version_0" / "checkpoints" / "last.ckpt"
    loaded = PRLModule.load_from_checkpoint(checkpoint)
    assert loaded.objective == Objective(beta=0.5)
    assert loaded.configure_optimizers().defaults["lr"] == 0.01
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert all(torch.equal(state[name], weight) for name, weight in loaded.state_dict().items())

    # The checkpoint's arguments do not replace those that a resumed run is given.
    fit(*run, "--model.objective.beta=0.25", f"--ckpt_path={checkpoint}")
    resumed = tmp_path / "run" / "version_1" / "checkpoints" / "last.ckpt"
    assert PRLModule.load_from_checkpoint(resumed).objective.beta == 0.25


EVIL = {"class_path": "os.system", "init_args": {"command": "touch trace"}}


@pytest.mark.parametrize(
    "hostile",
    [
        {"optimizer": EVIL},
        {"optimizer": "os.system"},
        {"lr_scheduler": {"class_path": "evil.Schedule"}},
        {"lora": {"r": EVIL}},
        {"optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": EVIL}}},
        {"objective": EVIL, "_instantiator": "lightning.pytorch.cli.instantiate_module"},
    ],
    ids=str,
)
def test_a_checkpoint_calls_nothing_that_it_names(
    hostile: dict[str, Any], tied_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """jsonargparse calls any function of a class_path; Lightning hands it what a file says."""
    file = saved(PRLModule(tied_model), tmp_path / "a.ckpt")
    checkpoint = torch.load(file, weights_only=True)
    checkpoint["hyper_parameters"] |= hostile
    torch.save(checkpoint, file)
    monkeypatch.chdir(tmp_path)
    Path("evil.py").write_text("open('trace', 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises((ValueError, TypeError)):
        PRLModule.load_from_checkpoint(file).configure_optimizers()
    with contextlib.suppress(ValueError, RuntimeError):  # of another policy, or without callbacks
        fit(*tiny_overrides(tied_model, tmp_path), f"--ckpt_path={file}")
    assert not Path("trace").exists()
