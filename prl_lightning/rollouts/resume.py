"""What a checkpoint needs beside Lightning's own, for a run to go on as if never stopped."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

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


def take_own(ranks: list[dict[str, Any]], trainer: Trainer) -> dict[str, Any]:
    """Set this rank's random state and return what it has saved; {} where there is none.

    Args:
        ranks: what each rank has saved, none for a new run.
        trainer: knows the rank.
    """
    if len(ranks) == trainer.world_size:
        own = ranks[trainer.global_rank]
        set_random_state(own["random"])
        return own
    if ranks:
        rank_zero_info(
            f"The checkpoint is of {len(ranks)} ranks and the run has {trainer.world_size}: it "
            "goes on with the same prompts and samples, but other random states."
        )
    return {}


def is_between_epochs(loop: Any) -> bool:
    """Whether Lightning goes on in an epoch whose start it takes for done.

    It does after a checkpoint of the last batch of an epoch.

    Args:
        loop: the fit loop, in ``on_train_start``.
    """
    epoch = loop.epoch_loop
    saved_at_its_end = epoch.restarted_on_train_batch_end and epoch.batch_progress.is_last_batch
    return bool(loop.restarted_mid_epoch and saved_at_its_end and not loop.done)


def rewind_progress(checkpoint: dict[str, Any], micro_batches: int) -> None:
    """Have the counts say where a run can go on: at the beginning of an update or of an epoch.

    The gradient of a half-made update is not kept, so it begins again. Of an epoch that is over or
    still being sampled nothing is left to do or done; without this, Lightning counts the former
    twice and skips the latter where ``max_steps`` is set.

    Args:
        checkpoint: Lightning's, changed in place.
        micro_batches: an update.
    """
    loop = checkpoint["loops"]["fit_loop"]
    epochs, batches = loop["epoch_progress"], loop["epoch_loop.batch_progress"]
    now = epochs["current"]
    begun = batches["current"]["ready"] % micro_batches
    if now["ready"] > now["started"] or now["started"] == now["processed"]:
        for counts in (epochs["total"], now):
            counts["ready"], counts["completed"] = counts["started"], counts["processed"]
        batches["current"] = dict.fromkeys(batches["current"], 0)
        batches["is_last_batch"] = False
    elif begun and not batches["is_last_batch"]:
        # Lightning counts the update before once more where it goes on from the end of a batch.
        if batches["total"]["completed"] < batches["total"]["processed"]:
            loop["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1
        for counts in (batches["total"], batches["current"]):
            counts.update({name: count - begun for name, count in counts.items()})
