"""Save or kill at a chosen moment, and the command as a process of its own."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import prl_lightning.trainer
from prl_lightning.cli import main
from ranks import start_on_ranks
from tiny_runs import ARITHMETIC, tiny_overrides
from warm import Warm

Settings = dict[str, Any]


def kill_all() -> None:
    os.killpg(os.getpgid(0), signal.SIGKILL)


class At(Callback):
    """Count the calls of one hook and act at the chosen one.

    Args:
        hook: name of the hook.
        call: which of its calls, from 0 on; those of the sanity check do not count.
    """

    def __init__(self, hook: str, call: int) -> None:
        self.call = call
        self.calls = 0
        setattr(self, hook, self._count)

    def _count(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if not trainer.sanity_checking:
            self.calls += 1
            if self.calls == self.call + 1:
                self.act(trainer)

    def act(self, trainer: Trainer) -> None:
        raise NotImplementedError


class SaveAt(At):
    def __init__(self, hook: str, call: int, path: str) -> None:
        super().__init__(hook, call)
        self.path = path

    def act(self, trainer: Trainer) -> None:
        trainer.save_checkpoint(self.path)


class KillAt(At):
    """SIGKILL for every process of the command, from its first one."""

    def act(self, trainer: Trainer) -> None:
        if trainer.is_global_zero:
            kill_all()


class SignalAt(At):
    """A signal for the first process of the command alone."""

    def __init__(self, hook: str, call: int, signum: int = int(signal.SIGTERM)) -> None:
        super().__init__(hook, call)
        self.signum = signum

    def act(self, trainer: Trainer) -> None:
        if trainer.is_global_zero:
            os.kill(os.getpid(), self.signum)


class KillWhileSaving(Callback):
    """SIGKILL with half of a checkpoint written."""

    def __init__(self, call: int) -> None:
        self.left = call
        self.to_disk = prl_lightning.trainer._to_disk
        prl_lightning.trainer._to_disk = self._half

    def _half(self, part: Path) -> None:
        if self.left == 0:
            os.truncate(part, part.stat().st_size // 2)
            kill_all()
        self.left -= 1
        self.to_disk(part)


CHECKPOINT = {
    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
    "init_args": {
        "save_last": True,
        "save_top_k": 0,
        "every_n_train_steps": 1,
        "every_n_epochs": None,
    },
}


class Command:
    """``prl fit`` on a tiny model: three epochs of two updates of two micro-batches.

    Args:
        model: folder of the policy.
        folder: of this command's data and runs.
        ranks: processes.
        strategy: of Lightning, for several ranks.
    """

    def __init__(self, model: str, folder: Path, ranks: int = 1, strategy: str = "ddp") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.ranks = ranks
        self.options = [
            *tiny_overrides(model, folder),
            "--rollout.rewards=[noisy.noisy_digits]",
            "--data.updates_per_epoch=2",
            "--model.objective.target=0.01",
            "--trainer.max_epochs=3",
            "--trainer.check_val_every_n_epoch=2",
            "--trainer.accelerator=cpu",
            f"--trainer.devices={ranks}",
            *([f"--trainer.strategy={strategy}"] if ranks > 1 else []),
        ]

    def start(self, *args: str, callbacks: tuple[Settings, ...] = ()) -> Warm:
        config = self.folder / "callbacks.yaml"
        config.write_text(yaml.safe_dump({"trainer": {"callbacks": [*callbacks, CHECKPOINT]}}))
        words = ["fit", f"--config={ARITHMETIC}", f"--config={config}", *self.options, *args]
        return start_on_ranks(self.ranks, main, words)

    def run(self, *args: str, callbacks: tuple[Settings, ...] = ()) -> tuple[int, str]:
        """Exit code and output."""
        return self.start(*args, callbacks=callbacks).finish()

    def last(self) -> Settings:
        """The newest checkpoint of all runs."""
        found = (self.folder / "run").glob("version_*/checkpoints/last.ckpt")
        newest = max(found, key=lambda path: path.stat().st_mtime_ns)
        if newest.is_file():
            return torch.load(newest, weights_only=True)
        whole = self.folder / "whole.ckpt"
        dcp_to_torch_save(newest, whole)
        state = torch.load(whole, weights_only=True)
        moments = {"optimizer_states": [state.pop("optimizer_0")]}
        return torch.load(newest / "meta.pt", weights_only=True) | state | moments


def callback(name: str, **init_args: Any) -> Settings:
    return {"class_path": f"interruptions.{name}", "init_args": init_args}


def differing(one: Settings, other: Settings) -> list[str]:
    """Parameters, optimizer states and betas that are not bitwise equal, and the prompts seen."""
    first, second = _tensors(one), _tensors(other)
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


def _tensors(checkpoint: Settings) -> dict[str, torch.Tensor]:
    moments = checkpoint["optimizer_states"][0]["state"]
    seen = torch.tensor([checkpoint["global_step"], checkpoint["PromptDataModule"]["prompts_seen"]])
    states = {f"{row}.{k}": v for row, state in moments.items() for k, v in state.items()}
    steered = [*checkpoint["steered_betas"].values(), *checkpoint["kl_totals"]]
    others = {"step and prompts": seen, "betas": torch.tensor(steered, dtype=torch.float64)}
    return checkpoint["state_dict"] | states | others
