"""Rollouts that do not depend on the policy, and a record of what a run did with them."""

from __future__ import annotations

import random
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor

from prl_lightning.models.sharding import full
from prl_lightning.module import PRLModule
from prl_lightning.sampling import Progress, Sampler, SamplingConfig
from prl_lightning.types import Completion, Prompt


class RecordedSampler(Sampler):
    """Completions of every length up to the limit, a function of the prompt's seed alone."""

    dtype = "float32"

    def start(self, model: str, max_model_tokens: int) -> None:
        pass

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """A strategy that shards gathers them here, one at a time."""
        previous: weakref.ref[Tensor] | None = None
        for _, tensor in weights:
            assert previous is None or previous() is None, "two whole weights are alive"
            previous = weakref.ref(tensor)
            del tensor

    def generate(
        self, prompts: Sequence[Prompt], config: SamplingConfig, on_progress: Progress | None = None
    ) -> list[list[Completion]]:
        return [
            [_completion(prompt.seed + sample, config.max_new_tokens) for sample in range(config.n)]
            for prompt in prompts
        ]

    def stop(self) -> None:
        pass


def _completion(seed: int, limit: int) -> Completion:
    draw = random.Random(seed)
    length = draw.randint(1, limit)
    token_ids = [draw.randrange(3, 18) for _ in range(length)]
    logprobs = [-draw.uniform(0.5, 4.0) for _ in range(length)]
    return Completion(token_ids, logprobs, finished=length < limit)


class Record(Callback):
    """Save the gradient of the first update and the trained parameters at the end."""

    def __init__(self, file: str) -> None:
        self.file = Path(file)
        self.record: dict[str, Any] = {}

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Any
    ) -> None:
        if "gradient" not in self.record:
            self.record["gradient"] = {
                name: full(parameter.grad).clone()
                for name, parameter in pl_module.named_parameters()
                if parameter.grad is not None
            }

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.record["before"] = _trained(pl_module)
        self.record["sent_before"] = _sent(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.record["after"] = _trained(pl_module)
        self.record["sent"] = _sent(pl_module)
        self.record["steps"] = trainer.global_step
        self.record["held"] = sum(_own(x).numel() for x in pl_module.state_dict().values())
        self.record["gradients_left"] = [
            name for name, parameter in pl_module.named_parameters() if parameter.grad is not None
        ]
        self.record["metrics"] = {k: float(v) for k, v in trainer.callback_metrics.items()}
        if trainer.is_global_zero:
            torch.save(self.record, self.file)


def _trained(module: LightningModule) -> dict[str, Tensor]:
    """Clones: a later update happens in place.

    Out of the state, for after a scoring pass FSDP2 leaves the root's parameters gathered.
    """
    return {name: full(tensor).clone() for name, tensor in module.state_dict().items()}


def _own(tensor: Tensor) -> Tensor:
    """What this rank holds of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _sent(module: LightningModule) -> dict[str, Tensor]:
    assert isinstance(module, PRLModule)
    return {name: tensor.clone() for name, tensor in module.weights()}
