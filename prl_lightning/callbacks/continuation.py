"""What a checkpoint needs beside Lightning's own, for a run to go on as if never stopped."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

from prl_lightning.data.loader import gather

SAVED = "prl_lightning"


def random_state() -> dict[str, Any]:
    """Random states of this process as values that a checkpoint may hold."""
    version, words, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "python": [version, list(words), gauss],
        "numpy": [str(kind), torch.from_numpy(np.array(keys, dtype=np.int64)), *rest],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Undo whatever has been drawn since.

    Args:
        state: as ``random_state`` has returned it.
    """
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))


def saved_state(trainer: Trainer, logged: dict[str, float]) -> dict[str, Any]:
    """What every rank has for itself; all ranks call this.

    Args:
        trainer: knows the ranks.
        logged: of the epoch that is under way.
    """
    own = {"random": random_state(), "logged": logged}
    return {"ranks": gather(own, trainer.global_rank, trainer.world_size)}


def take_own(saved: dict[str, Any], trainer: Trainer) -> dict[str, Any]:
    """Set this rank's random state and return the rest of its share; {} where there is none.

    Args:
        saved: as ``saved_state`` has returned it, or {}.
        trainer: knows the rank.
    """
    ranks = saved.get("ranks", [])
    if not ranks:
        return {}
    if len(ranks) != trainer.world_size:
        rank_zero_info(
            f"The checkpoint is of {len(ranks)} ranks and the run has {trainer.world_size}: it "
            "goes on with the same prompts and samples, but other random states."
        )
        return {}
    own: dict[str, Any] = ranks[trainer.global_rank]
    set_random_state(own["random"])
    return own


def is_between_epochs(loop: Any) -> bool:
    """Whether Lightning goes on in an epoch whose start it takes for done.

    It does after a checkpoint of the last batch of an epoch.

    Args:
        loop: the fit loop, in ``on_train_start``.
    """
    epoch = loop.epoch_loop
    saved_at_its_end = epoch.restarted_on_train_batch_end and epoch.batch_progress.is_last_batch
    return bool(loop.restarted_mid_epoch and saved_at_its_end and not loop.done)


def rewind_update(checkpoint: dict[str, Any], micro_batches: int) -> None:
    """Have an update that is under way begin again: its gradient is not in a checkpoint.

    Args:
        checkpoint: Lightning's, changed in place.
        micro_batches: an update.
    """
    loop = checkpoint["loops"]["fit_loop"]
    progress = loop["epoch_loop.batch_progress"]
    begun = progress["current"]["ready"] % micro_batches
    if not begun or progress["is_last_batch"]:
        return
    # Lightning counts the update before once more where it goes on from the end of a batch.
    if progress["total"]["completed"] < progress["total"]["processed"]:
        loop["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1
    for counts in (progress["total"], progress["current"]):
        for name in counts:
            counts[name] -= begun
