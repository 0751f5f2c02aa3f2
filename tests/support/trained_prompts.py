"""Record which prompts the updates of a run use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from prl_lightning.data.rollouts import equal_parts
from prl_lightning.distributed import gather
from prl_lightning.trainer_access import prompt_data


class TrainedPrompts(Callback):
    """Append a line an epoch: the seeds of each update's prompts, and the position in the data.

    Args:
        file: gets the lines; one of a continued run repeats those of the epoch under way.
    """

    def __init__(self, file: str) -> None:
        self.file = Path(file)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        data = prompt_data(trainer)
        own = [rollout.prompt.seed for rollout in data.train_buffer.rollouts]
        shares = gather(equal_parts(own, data.updates_per_epoch)) if batch_idx == 0 else None
        if shares is None:
            return
        updates = [sorted(set().union(*parts)) for parts in zip(*shares, strict=True)]
        with self.file.open("a") as lines:
            lines.write(json.dumps({"updates": updates, "position": data.prompts_seen}) + "\n")


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]
