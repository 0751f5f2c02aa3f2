"""What a process takes, epoch by epoch; a run imports the callback by this name."""

from __future__ import annotations

import json
import time
from pathlib import Path

import psutil
from lightning.pytorch import Callback, LightningModule, Trainer


class Watch(Callback):
    """Append a line of JSON an epoch: memory, open files, threads, children.

    Args:
        file: to append to.
    """

    def __init__(self, file: str) -> None:
        self.file = Path(file)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        own = psutil.Process()
        children = own.children(recursive=True)
        row = {
            "time": time.monotonic(),
            "mib": own.memory_info().rss / 2**20,
            "mib_children": sum(memory(child) for child in children) / 2**20,
            "files": own.num_fds(),
            "threads": own.num_threads(),
            "children": len(children),
        }
        with self.file.open("a") as lines:
            lines.write(json.dumps(row) + "\n")


def memory(process: psutil.Process) -> int:
    """Of its own: what is shared with the process it was forked from counts there."""
    try:
        return int(process.memory_full_info().uss)
    except psutil.Error:  # it has just ended
        return 0
