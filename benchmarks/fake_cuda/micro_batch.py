"""Training steps without a Trainer: a tiny micro-batch for each objective, and a module."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from prl_lightning.data import collate
from prl_lightning.functional import EngineCorrection
from prl_lightning.module import PRLModule
from prl_lightning.objective import Objective
from prl_lightning.types import Completion, Prompt, Rollout, RolloutBatch

OBJECTIVES = {
    "token": Objective(),
    "newline steps": Objective(steps="newline"),
    "blank line steps": Objective(steps="blank_line"),
    "steps of 256": Objective(steps=256),
    "k3 with baseline": Objective(divergence="reverse_k3", baseline=True),
    "KL in the loss": Objective(kl="loss"),
    "KL in the reward": Objective(kl="reward_step"),
    "importance cap": Objective(log_ratio="rollout", engine_correction=EngineCorrection()),
    "constant": Objective(aggregation="constant", max_length=8),
    "sequence mean": Objective(aggregation="sequence_mean"),
}
# Two groups and a row alone, of unequal lengths, so that there are several blocks; token 2 is a
# line end, 1 the end.
ROWS = [
    ([5, 14, 7], [4, 2, 1]),
    ([5, 14, 7], [8]),
    ([5, 14, 7], [3, 2, 2, 12, 11, 6, 1]),
    ([6, 13], [2, 9]),
    ([6, 13], [2, 9, 10, 1]),
    ([5, 14, 7, 3], [1]),
]


def micro_batch(objective: Objective) -> RolloutBatch:
    """Rollouts with all that an objective reads, on the CPU."""
    rollouts = []
    for prompt, completion in ROWS:
        shape = (len(completion),)
        known = objective.log_ratio == "rollout"
        rollouts.append(
            Rollout(
                Prompt(prompt, ""),
                Completion(completion, [-1.0] * len(completion), finished=True),
                text="",
                outcome_advantage=torch.full(shape if objective.needs_log_ratios else (), 0.5),
                old_logprobs=torch.full(shape, -1.5) if known else None,
            )
        )
    return collate(rollouts, sum(len(completion) for _, completion in ROWS), len(ROWS))


class WithoutTrainer(PRLModule):
    """PRLModule whose ``training_step`` needs no Trainer.

    Args:
        policy: see PRLModule.
        objective: likewise.
        autocast: entered where a Trainer's precision would be, around the reference.

    Attributes:
        logged: every value of the last step.
    """

    def __init__(
        self,
        policy: str,
        objective: Objective,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        super().__init__(policy, objective)
        self.logged: dict[str, Tensor] = {}
        trainer: Any = SimpleNamespace(
            accumulate_grad_batches=4,
            world_size=1,
            strategy=None,
            precision_plugin=SimpleNamespace(forward_context=autocast),
        )
        self.trainer = trainer

    def log_dict(self, dictionary: Any, *args: Any, **kwargs: Any) -> None:
        self.logged.update(dictionary)

    def pad(self) -> None:
        """Read padded rows, as an architecture does whose attention cannot be replaced."""
        models: Any = (self.policy, *self.references.models.values())
        for model in models:
            model.causal_lm.set_attn_implementation("sdpa")
            model.is_packed = False
