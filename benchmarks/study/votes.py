"""maj@16 of the study's problem: what an answer by vote of 16 samples is worth."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from prl_lightning.evaluation.metrics import MajorityAtN

VOTERS = 16
ANSWER = re.compile(r"boxed\{(\d+)\}")


class MajorityVote(Callback):
    """Log ``val/<set>/maj@16``, a mean over problems and over their samples in sixteens."""

    def __init__(self) -> None:
        self.votes: dict[str, MajorityAtN] = defaultdict(MajorityAtN)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Vote on one problem: its samples are one batch."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        name = list(data.eval_buffers)[dataloader_idx]
        rollouts = data.eval_buffers[name].micro_batch_rollouts[batch_idx]
        found = [ANSWER.search(rollout.text) for rollout in rollouts]
        # Numbered as they come: an answer may have more digits than an int64 holds.
        numbers: dict[str, int] = {}
        answers = torch.tensor(
            [numbers.setdefault(m[1].lstrip("0"), len(numbers)) if m else -1 for m in found]
        )
        self.votes[name].update(answers.view(-1, VOTERS), (batch.rewards > 0).view(-1, VOTERS))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the means."""
        for name, votes in self.votes.items():
            pl_module.log(f"val/{name}/maj@{VOTERS}", votes.compute().float())
        self.votes.clear()
