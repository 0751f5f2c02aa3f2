"""A module's arguments as plain data, for checkpoints that are read with ``weights_only``."""

from __future__ import annotations

from dataclasses import asdict, is_dataclass
from inspect import signature
from typing import Any

from lightning.pytorch import LightningModule
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

# Lightning calls it with what was saved: it reads the arguments as it would from a configuration.
INSTANTIATOR = "lightning.pytorch.cli.instantiate_module"
PLAIN = (bool, int, float, str, dict, list, tuple)


def make_plain(module: LightningModule) -> None:
    """Replace a module's hyperparameters by the form of a configuration, which checkpoints hold.

    A function becomes the name of one that raises when it is called, unless it is the default.
    Other objects, which only a subclass can have, are left out: a resumed run could not read them.

    Args:
        module: has called ``save_hyperparameters``. The command's values are plain already, those
            of a Python program are objects.
    """
    defaults = {k: v.default for k, v in signature(type(module)).parameters.items()}
    arguments, hparams = dict(module.hparams), module.hparams
    hparams.clear()
    hparams["_instantiator"] = INSTANTIATOR
    for name, value in arguments.items():
        if is_dataclass(value) and not isinstance(value, type):
            hparams[name] = asdict(value)
        elif value is None or isinstance(value, PLAIN):
            hparams[name] = value
        elif callable(value) and value is not defaults.get(name):
            hparams[name] = f"{__name__}.unsaved_{name}"


# jsonargparse wants functions that return what the arguments do.
def unsaved_optimizer(*_: Any) -> Optimizer:
    """Stand in for the function of a Python program.

    Raises:
        ValueError: always.
    """
    raise _unsaved("optimizer")


def unsaved_lr_scheduler(*_: Any) -> LRScheduler:
    """Stand in for the function of a Python program.

    Raises:
        ValueError: always.
    """
    raise _unsaved("lr_scheduler")


def _unsaved(name: str) -> ValueError:
    return ValueError(
        f"model.{name} was a function of a Python program, which a checkpoint does not hold. Pass "
        f"it: PRLModule.load_from_checkpoint(path, {name}=...)."
    )
