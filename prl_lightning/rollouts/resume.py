"""Resume a run with bit-identical results, also in the middle of an epoch.

Lightning restores weights, optimizer and loop counters, and RolloutLoader the rollouts of an
unfinished epoch. Added here: the random states of each rank, the values that the epoch has logged,
and loop counters set back to the start of an update.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

from prl_lightning.distributed import gather

SAVED = "prl_lightning"


class ResumeState:
    """The part of a checkpoint that differs between ranks.

    Attributes:
        logged: values that the current epoch has logged.
    """

    def __init__(self) -> None:
        self.logged: dict[str, float] = {}
        self._loaded: list[dict[str, Any]] = []

    def save(self, checkpoint: dict[str, Any], trainer: Trainer) -> None:
        """Add the state of all ranks to a checkpoint; a collective."""
        rewind_progress(checkpoint, trainer.accumulate_grad_batches)
        own = {"random": random_state(), "logged": self.logged}
        checkpoint[SAVED] = gather(own)

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Keep a checkpoint's state until ``restore``: setting up a run draws random numbers."""
        self._loaded = checkpoint.get(SAVED, [])

    def restore(self, trainer: Trainer) -> bool:
        """Restore this rank's state, and return whether there was one."""
        loaded, self._loaded = self._loaded, []
        if len(loaded) != trainer.world_size:
            if loaded:
                rank_zero_info(
                    f"The checkpoint is of {len(loaded)} ranks and the run has "
                    f"{trainer.world_size}: it continues with the same prompts and samples, but "
                    "with other random states."
                )
            return False
        own = loaded[trainer.global_rank]
        set_random_state(own["random"])
        self.logged = own["logged"]
        return True


def random_state() -> dict[str, Any]:
    """Return the random states of this process as values that a checkpoint can hold."""
    version, words, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "python": [version, list(words), gauss],
        "numpy": [str(kind), torch.from_numpy(np.array(keys, dtype=np.int64)), *rest],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Set the random states that ``random_state`` returned."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))


def is_between_epochs(loop: Any) -> bool:
    """Whether Lightning continues in a new epoch without calling ``on_train_epoch_start``.

    It does so after a checkpoint of the last batch of an epoch.

    Args:
        loop: the fit loop, in ``on_train_start``.
    """
    epoch = loop.epoch_loop
    saved_at_its_end = epoch.restarted_on_train_batch_end and epoch.batch_progress.is_last_batch
    return bool(loop.restarted_mid_epoch and saved_at_its_end and not loop.done)


def rewind_progress(checkpoint: dict[str, Any], micro_batches: int) -> None:
    """Set the loop counters back to the start of an update or an epoch, where a run can continue.

    The gradient of a partial update is not saved, so the update is repeated. If the epoch is still
    being sampled, it starts again. If it is finished, the next one starts. If the run ended within
    it (max_steps, max_time), its other updates follow. Without this, Lightning would count a
    finished epoch twice, and skip an unfinished one if ``max_steps`` is set.

    Args:
        checkpoint: Lightning's, changed in place.
        micro_batches: per update.
    """
    loop = checkpoint["loops"]["fit_loop"]
    epochs, batches = loop["epoch_progress"], loop["epoch_loop.batch_progress"]
    now, ready = epochs["current"], batches["current"]["ready"]
    begun = 0 if batches["is_last_batch"] else ready % micro_batches
    is_over = now["started"] == now["processed"]
    is_cut = is_over and ready > 0 and not batches["is_last_batch"]
    if is_cut:
        for counts in (epochs["total"], now):
            counts["processed"] = counts["completed"] = counts["started"] - 1
    elif is_over or now["ready"] > now["started"]:
        for counts in (epochs["total"], now):
            counts["ready"], counts["completed"] = counts["started"], counts["processed"]
        batches["current"] = dict.fromkeys(batches["current"], 0)
        batches["is_last_batch"] = False
        return
    if is_cut or begun:  # as if saved at the end of the previous update's last batch
        for counts in (batches["total"], batches["current"]):
            done = counts["ready"] - begun
            counts.update(ready=done, started=done, processed=done, completed=done - 1)
        # Lightning counts that update when it continues.
        loop["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1
