"""Sampling ahead: order, age of the completions, and what the importance ratio refers to."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from threading import current_thread, main_thread
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from prl_lightning.callbacks import RolloutCallback
from prl_lightning.data import PromptDataModule
from prl_lightning.evaluation import Evaluation
from prl_lightning.module import PRLModule
from prl_lightning.objective import Objective
from prl_lightning.sampling import HFSampler, Progress, SamplingConfig
from prl_lightning.types import Completion, Prompt, RolloutBatch
from sample_rewards import even_digits
from tiny_runs import write_prompts

EPOCHS = 4
PATIENCE = 60.0  # seconds; a run that does not overlap would wait for ever


class ConcurrentSampler(HFSampler):
    """What it draws in another thread is not there before the next update has happened."""

    is_concurrent = True

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.updates = 0
        self.updates_at_load = 0
        self.fails_in_call: int | None = None

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.updates_at_load = self.updates
        super().load_weights(weights)

    def generate(
        self, prompts: Sequence[Prompt], config: SamplingConfig, on_progress: Progress | None = None
    ) -> list[list[Completion]]:
        self.calls += 1
        if self.calls == self.fails_in_call:
            raise OSError("the engine has lost its way")
        end = time.monotonic() + PATIENCE
        while current_thread() is not main_thread() and self.updates == self.updates_at_load:
            if time.monotonic() > end:
                raise TimeoutError("no update happened while this was being drawn")
            time.sleep(0.001)
        return super().generate(prompts, config, on_progress)


class Watch(Callback):
    """Keep the weights of each epoch's start, its only batch, and what was logged."""

    def __init__(self, sampler: ConcurrentSampler) -> None:
        self.sampler = sampler
        self.weights: list[dict[str, Tensor]] = []
        self.batches: list[RolloutBatch] = []
        self.values: list[dict[str, float]] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, PRLModule)
        assert pl_module.policy is not None
        state = pl_module.policy.state_dict()
        self.weights.append({name: tensor.clone() for name, tensor in state.items()})

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.batches.append(batch)

    def on_train_batch_end(self, *args: Any) -> None:
        self.sampler.updates += 1

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.values.append({k: float(v) for k, v in trainer.callback_metrics.items()})


def run(
    model: str, folder: Path, sampler: ConcurrentSampler, evaluates: bool = False
) -> tuple[PRLModule, Watch]:
    prompts = str(write_prompts(folder / "train.jsonl"))
    module = PRLModule(
        model, Objective(beta=0.1), optimizer=lambda params: torch.optim.SGD(params, lr=0.5)
    )
    data = PromptDataModule(
        model,
        prompts,
        evaluation=Evaluation({"heldout": prompts} if evaluates else {}, samples=2, pass_at=(2,)),
        prompts_per_epoch=4,
        group_size=4,
        max_prompt_tokens=16,
    )
    rollout = RolloutCallback([even_digits], sampler, max_new_tokens=8, overlap=True)
    watch = Watch(sampler)
    Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        num_sanity_val_steps=0,
        callbacks=[rollout, watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, datamodule=data)
    return module, watch


def test_no_thread_of_the_engine_is_left_behind(tied_model: str, tmp_path: Path) -> None:
    run(tied_model, tmp_path, ConcurrentSampler())
    for thread in threading.enumerate():
        if thread.name.startswith("prl-engine"):
            thread.join(timeout=30)  # it ends once it is told to
            assert not thread.is_alive()


@pytest.mark.parametrize("evaluates", [False, True], ids=["training", "evaluating-in-between"])
def test_completions_are_of_the_policy_one_update_before(
    tied_model: str, tmp_path: Path, evaluates: bool
) -> None:
    sampler = ConcurrentSampler()
    module, watch = run(tied_model, tmp_path, sampler, evaluates)
    assert module.policy is not None
    assert sampler.calls == EPOCHS * (1 + evaluates)  # and nothing after the last epoch
    assert [values["rollout/staleness"] for values in watch.values] == [0, 1, 1, 1]
    assert watch.batches[0].old_logprobs is None
    for epoch in range(1, EPOCHS):
        batch = watch.batches[epoch]
        mask, old = batch.completion_mask, batch.old_logprobs
        assert old is not None
        gaps = []
        for weights in watch.weights[epoch - 1 : epoch + 1]:
            module.policy.load_state_dict(weights)
            with torch.no_grad():
                gaps.append((module.policy(batch)[0] - old).abs()[mask].max().item())
        assert gaps[0] < 1e-4
        assert gaps[1] > 1e-3  # the ratio has something to correct
        assert watch.values[epoch]["train/ratio_max"] > 1.0


def test_prompts_are_those_of_a_run_that_samples_in_turn(tied_model: str, tmp_path: Path) -> None:
    _, watch = run(tied_model, tmp_path, ConcurrentSampler())
    data = PromptDataModule(
        tied_model, str(tmp_path / "train.jsonl"), prompts_per_epoch=4, group_size=4,
        max_prompt_tokens=16,
    )  # fmt: skip
    data.setup("fit")
    for batch in watch.batches:
        trained = {
            tuple(row[:length].tolist())
            for row, length in zip(batch.input_ids, batch.prompt_lengths, strict=True)
        }
        assert trained == {tuple(prompt.token_ids) for prompt in data.next_prompts()}
        data.advance()


def test_an_error_while_drawing_ahead_ends_the_run(tied_model: str, tmp_path: Path) -> None:
    sampler = ConcurrentSampler()
    sampler.fails_in_call = 3
    with pytest.raises(RuntimeError, match="OSError: the engine has lost its way"):
        run(tied_model, tmp_path, sampler)


def test_a_sampler_of_this_process_cannot_overlap() -> None:
    with pytest.raises(ValueError, match=r"rollout.overlap=true.*SubprocessSampler"):
        RolloutCallback([even_digits], HFSampler(), overlap=True)
