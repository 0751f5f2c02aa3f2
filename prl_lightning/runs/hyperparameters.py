"""A module's arguments as plain data, for checkpoints that are read with ``weights_only``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

# Lightning calls it with what was saved: it reads the arguments as it would from a configuration.
INSTANTIATOR = "lightning.pytorch.cli.instantiate_module"
PLAIN = (bool, int, float, str, dict, list, tuple)


def plain(arguments: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments in the form of a configuration, for ``load_from_checkpoint``.

    Args:
        arguments: of the command they are plain already, of a Python program they are objects.
        defaults: a function that is one is left out.

    Returns:
        Plain data. A function becomes the name of one that raises when it is called. Other objects,
        which only a subclass can have, are left out: a resumed run could not read the file.
    """
    saved: dict[str, Any] = {"_instantiator": INSTANTIATOR}
    for name, value in arguments.items():
        if is_dataclass(value) and not isinstance(value, type):
            saved[name] = asdict(value)
        elif value is None or isinstance(value, PLAIN):
            saved[name] = value
        elif callable(value) and value is not defaults.get(name):
            saved[name] = f"{__name__}.unsaved_{name}"
    return saved


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
