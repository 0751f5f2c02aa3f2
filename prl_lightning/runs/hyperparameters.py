"""A module's arguments as plain data in its checkpoints, and back.

Lightning and jsonargparse would call any function that a checkpoint names, with arguments from the
file. Here only classes of optimizers and schedules are made from it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from inspect import signature
from typing import Any, NoReturn

from lightning.pytorch import LightningModule
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from prl_lightning.functional import EngineCorrection
from prl_lightning.objective import Objective
from prl_lightning.references import Reference

PLAIN = (bool, int, float, str, dict, list, tuple)
KINDS: dict[str, type] = {"optimizer": Optimizer, "lr_scheduler": LRScheduler}
UNSAVED = "a function of a Python program"


def make_plain(module: LightningModule) -> None:
    """Replace a module's hyperparameters by the form of a configuration, which checkpoints hold.

    A function is marked as unsaved, unless it is the default. Other objects, which only a subclass
    can have, are left out: a resumed run could not read them.

    Args:
        module: has called ``save_hyperparameters``. The command's values are plain already, those
            of a Python program are objects.
    """
    defaults = {k: v.default for k, v in signature(type(module)).parameters.items()}
    arguments, hparams = dict(module.hparams), module.hparams
    hparams.clear()
    for name, value in arguments.items():
        if isinstance(value, Objective):
            hparams[name] = asdict(value)
        elif name in defaults and (value is None or isinstance(value, PLAIN)):
            hparams[name] = value
        elif name in KINDS and value is not defaults.get(name):
            hparams[name] = UNSAVED


def arguments_of(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return a module's arguments from those that a checkpoint holds.

    Args:
        saved: the plain data.

    Raises:
        ValueError: the optimizer or the schedule is none that the program has imported.
    """
    arguments = dict(saved)
    if "objective" in saved:
        arguments["objective"] = _objective(**saved["objective"])
    for name in KINDS.keys() & {name for name, value in saved.items() if value is not None}:
        arguments[name] = _factory(name, saved[name])
    return arguments


def _objective(
    references: Mapping[str, Any], engine_correction: Mapping[str, Any] | None, **values: Any
) -> Objective:
    return Objective(
        references={name: Reference(**value) for name, value in references.items()},
        engine_correction=None
        if engine_correction is None
        else EngineCorrection(**engine_correction),
        **values,
    )


def _factory(name: str, value: Any) -> Callable[..., Any]:
    """Return what makes the optimizer or the schedule, as ``class_path`` and ``init_args`` say."""
    if value == UNSAVED:
        return partial(_ask_for, name)
    path = value.get("class_path") if isinstance(value, dict) else value
    module, _, kind = str(path).rpartition(".")
    found = getattr(sys.modules.get(module), kind, None)  # nothing is imported on behalf of a file
    if not (isinstance(found, type) and issubclass(found, KINDS[name])):
        raise ValueError(
            f"the checkpoint's {name} is {path!r}, which is no {KINDS[name].__name__} that this "
            f"program has imported. Import its module first, or pass {name}=..."
        )
    return partial(found, **value.get("init_args", {}))


def _ask_for(name: str, *_: Any) -> NoReturn:
    raise ValueError(
        f"model.{name} was {UNSAVED}, which a checkpoint does not hold. Pass it: "
        f"PRLModule.load_from_checkpoint(path, {name}=...)."
    )
