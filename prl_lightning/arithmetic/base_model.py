"""A base model for the arithmetic problem, trained here on traces with slips."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator

import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from prl_lightning.arithmetic.problems import Problem
from prl_lightning.runs.progress import is_interactive

IGNORED = -100


class _Traces(IterableDataset[tuple[Tensor, Tensor]]):
    """Endless batches of (input_ids, labels): problems with a fresh noisy trace each time."""

    def __init__(
        self,
        problems: list[Problem],
        tokenizer: PreTrainedTokenizerBase,
        error_rate: float,
        batch_size: int,
        seed: int,
    ) -> None:
        self.problems = problems
        self.tokenizer = tokenizer
        self.error_rate = error_rate
        self.batch_size = batch_size
        self.seed = seed

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        rng = random.Random(self.seed)
        while True:
            chosen = rng.choices(self.problems, k=self.batch_size)
            rows = [
                problem.prompt + problem.trace(self.error_rate, rng) + self.tokenizer.eos_token
                for problem in chosen
            ]
            encoded = self.tokenizer(rows, padding=True, padding_side="right", return_tensors="pt")
            labels = encoded["input_ids"].masked_fill(encoded["attention_mask"] == 0, IGNORED)
            for row, problem in enumerate(chosen):
                labels[row, : len(problem.prompt)] = IGNORED
            yield encoded["input_ids"], labels


class _Pretraining(LightningModule):
    def __init__(self, model: Qwen2ForCausalLM, learning_rate: float, steps: int) -> None:
        super().__init__()
        self.model = model
        self.learning_rate = learning_rate
        self.steps = steps

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        input_ids, labels = batch
        loss: Tensor = self.model(input_ids=input_ids, labels=labels).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.learning_rate, total_steps=self.steps, pct_start=0.05
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def train_base_model(
    problems: list[Problem],
    tokenizer: PreTrainedTokenizerBase,
    error_rate: float = 0.25,
    hidden_size: int = 128,
    layers: int = 3,
    steps: int = 400,
    batch_size: int = 128,
    learning_rate: float = 2e-3,
    seed: int = 0,
) -> Qwen2ForCausalLM:
    """Train a small Qwen2 on traces whose steps are wrong with probability ``error_rate``.

    It learns the format and the distribution of the slips: some completions of every problem are
    right, which is what reinforcement learning needs to start from.

    Args:
        problems: to learn from.
        tokenizer: of one token a character.
        error_rate: of a step.
        hidden_size: of the model; heads have 32.
        layers: of the model.
        steps: optimizer steps.
        batch_size: traces a step.
        learning_rate: the highest of its schedule.
        seed: of the initial weights and the traces.

    Returns:
        The trained model, on the CPU.
    """
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=hidden_size // 32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config)
    traces = _Traces(problems, tokenizer, error_rate, batch_size, seed)
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=1,
        # One process, whatever launcher or cluster the surrounding run belongs to.
        plugins=[LightningEnvironment()],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=is_interactive(sys.stdout),
        gradient_clip_val=1.0,
    )
    trainer.fit(_Pretraining(model, learning_rate, steps), DataLoader(traces, batch_size=None))
    return model
