"""Fit a tiny model through a Trainer, and record what it trains on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from prl_lightning.callbacks import RolloutCallback
from prl_lightning.data import PromptDataModule
from prl_lightning.evaluation import Evaluation
from prl_lightning.module import PRLModule
from prl_lightning.objective import Objective
from prl_lightning.rewards import RewardFunction
from prl_lightning.sampling import HFSampler
from prl_lightning.types import RolloutBatch
from sample_rewards import even_digits
from tiny_runs import write_prompts

# Options of the command line: no evaluation, no stored completions.
TRAIN_ALONE = (
    "--trainer.num_sanity_val_steps=0",
    "--trainer.limit_val_batches=0",
    "--completions.every_n_epochs=0",
)


class Watch(Callback):
    """Record the weights at each epoch's start, every micro-batch, and the logged values."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.batches: list[RolloutBatch] = []
        self.values: list[dict[str, float]] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.weights.append(weights_of(pl_module))

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.batches.append(batch)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.values.append({k: float(v) for k, v in trainer.callback_metrics.items()})


def weights_of(module: LightningModule) -> dict[str, Tensor]:
    assert isinstance(module, PRLModule)
    state = module.loaded_policy.state_dict()
    return {name: tensor.clone() for name, tensor in state.items()}


def train(
    model: str,
    folder: Path,
    *callbacks: Callback,
    objective: Objective | None = None,
    sampler: HFSampler | None = None,
    rewards: Sequence[RewardFunction] = (even_digits,),
    rollout: dict[str, Any] | None = None,
    learning_rate: float = 1e-2,
    epochs: int = 2,
    accumulate: int = 2,
    trainer: dict[str, Any] | None = None,
    checkpoint: Path | None = None,
    **data: Any,
) -> tuple[PRLModule, Watch]:
    """Fit with four prompts per epoch and four completions per prompt."""
    module = PRLModule(
        model,
        objective or Objective(beta=0.1),
        optimizer=lambda params: torch.optim.SGD(params, lr=learning_rate),
    )
    sizes = {"prompts_per_epoch": 4, "group_size": 4, "max_prompt_tokens": 16}
    sets = {"evaluation": Evaluation(samples=2, pass_at=(2,))}
    prompts = str(write_prompts(folder / "train.jsonl"))
    datamodule = PromptDataModule(model, prompts, **(sizes | sets | data))
    settings = {"max_new_tokens": 8} | (rollout or {})
    watch = Watch()
    options: dict[str, Any] = {
        "logger": False, "default_root_dir": folder / "root", "enable_checkpointing": False,
    }  # fmt: skip
    Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        accumulate_grad_batches=accumulate,
        callbacks=[
            RolloutCallback(list(rewards), sampler or HFSampler(), **settings),
            watch,
            *callbacks,
        ],
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **(options | (trainer or {})),
    ).fit(module, datamodule=datamodule, ckpt_path=checkpoint)
    return module, watch
