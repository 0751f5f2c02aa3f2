"""maj@16 of the study's problem: what an answer by vote of 16 samples is worth."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

VOTERS = 16
ANSWER = re.compile(r"boxed\{(\d+)\}")


def vote(answers: Sequence[str | None], right: str) -> float:
    """Chance that the most frequent answer is right, where a tie is settled by lot.

    Args:
        answers: of the samples; None abstains.
        right: the answer.
    """
    counts = Counter(answer for answer in answers if answer is not None)
    most = max(counts.values(), default=0)
    tied = [answer for answer, count in counts.items() if count == most]
    return (right in tied) / max(1, len(tied))


class MajorityVote(Callback):
    """Log ``val/<set>/maj@16``, a mean over problems and over their samples in sixteens."""

    def __init__(self) -> None:
        self.votes: dict[str, list[float]] = {}

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
        name = list(data.eval_rollouts)[dataloader_idx]
        rollouts = data.eval_rollouts[name].micro_batch_rollouts[batch_idx]
        found = [ANSWER.search(rollout.text) for rollout in rollouts]
        answers = [match and match[1] for match in found]
        right = rollouts[0].prompt.columns["answer"]
        votes = self.votes.setdefault(name, [])
        votes += [vote(answers[i : i + VOTERS], right) for i in range(0, len(answers), VOTERS)]

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the means."""
        for name, votes in self.votes.items():
            pl_module.log(f"val/{name}/maj@{VOTERS}", sum(votes) / len(votes))
        self.votes.clear()
