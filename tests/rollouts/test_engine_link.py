"""The engine has the module's weights at every draw, whoever changes them and however."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor

from prl_lightning.evaluation import Evaluation
from prl_lightning.module import PRLModule
from prl_lightning.sampling import HFSampler
from tiny_runs import write_prompts
from trainer_runs import train

pytestmark = pytest.mark.process
NAME = "model.layers.0.mlp.up_proj.weight"


def weight_of(module: LightningModule) -> Tensor:
    assert isinstance(module, PRLModule)
    return module.loaded_policy.get_parameter(f"causal_lm.{NAME}").detach().clone()


class Recorder(HFSampler):
    """Record a weight of the engine at every draw."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[Tensor] = []

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        self.drawn.append(self._started().get_parameter(NAME).clone())
        return super().generate(*args, **kwargs)


class Forgetful(Recorder):
    """Keeps no weights while the trainer trains."""

    def release_weights(self) -> bool:
        for weight in self._started().parameters():
            weight.data.fill_(torch.nan)
        return True


class Expected(Callback):
    """Record the module's weight when an epoch or an evaluation has begun."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []
        self.gaps: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.is_last_batch:  # there is a single one
            self.weights.append(weight_of(pl_module))

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if batch_idx == 0:
            self.weights.append(weight_of(pl_module))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.gaps.append(float(trainer.callback_metrics["rollout/engine_gap"]))


class Halved(Callback):
    """Evaluate half of every weight, in new tensors instead of changed ones."""

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.kept = [parameter.data for parameter in pl_module.parameters()]
        for parameter in pl_module.parameters():
            parameter.data = parameter.data / 2

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for parameter, kept in zip(pl_module.parameters(), self.kept, strict=True):
            parameter.data = kept


@pytest.mark.parametrize("kind", [Recorder, Forgetful])
@pytest.mark.parametrize("swap", [EMAWeightAveraging(decay=0.5), Halved()], ids=["ema", "halved"])
def test_callbacks_may_swap_weights_for_the_evaluation(
    swap: Callback, kind: type[Recorder], tied_model: str, tmp_path: Path
) -> None:
    """The callback stands after RolloutCallback in the list, whose order must not matter."""
    sampler, expected = kind(), Expected()
    held = str(write_prompts(tmp_path / "held.jsonl", count=2, seed=1))
    train(
        tied_model, tmp_path, swap, expected, sampler=sampler, learning_rate=1.0, epochs=3,
        accumulate=1, prompts_per_epoch=1,
        evaluation=Evaluation({"held": held}, samples=2, pass_at=(2,)),
    )  # fmt: skip
    assert len(sampler.drawn) == len(expected.weights) == 6
    for drawn, own in zip(sampler.drawn, expected.weights, strict=True):
        assert torch.equal(drawn, own)
    # The average begins as the policy after the first update, and then differs.
    assert not torch.equal(sampler.drawn[3], sampler.drawn[4])
    assert max(expected.gaps) < 1e-5


def test_an_engine_without_memory_says_what_to_set(tied_model: str, tmp_path: Path) -> None:
    class Large(HFSampler):
        def start(self, model: str, max_model_tokens: int) -> None:
            raise ValueError("No available memory for the cache blocks.")

    with pytest.raises(RuntimeError, match=r"Large.*cache blocks\. .*gpu_memory_utilization"):
        train(tied_model, tmp_path, sampler=Large())
