"""Prefetching: order and age of the completions, and the policy of the importance ratio."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor

from prl_lightning.callbacks import RolloutCallback
from prl_lightning.data import PromptDataModule
from prl_lightning.evaluation import Evaluation
from prl_lightning.module import PRLModule
from prl_lightning.sampling import HFSampler, Progress, SamplingConfig
from prl_lightning.types import Completion, Prompt
from sample_rewards import even_digits
from tiny_runs import write_prompts
from trainer_runs import Watch, train

pytestmark = pytest.mark.process

EPOCHS = 4
TIMEOUT = 600.0  # seconds; without overlap the sampler would wait forever


class ConcurrentSampler(HFSampler):
    """In another thread, it returns nothing before an update has happened."""

    is_concurrent = True

    def __init__(self, fails_in_call: int | None = None) -> None:
        super().__init__()
        self.calls = 0
        self.fails_in_call = fails_in_call
        self.updated = threading.Event()

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.updated.clear()
        super().load_weights(weights)

    def generate(
        self, prompts: Sequence[Prompt], config: SamplingConfig, on_progress: Progress | None = None
    ) -> list[list[Completion]]:
        self.calls += 1
        if self.calls == self.fails_in_call:
            raise OSError("engine_lost")
        is_prefetched = threading.current_thread() is not threading.main_thread()
        if is_prefetched and not self.updated.wait(TIMEOUT):
            raise TimeoutError("no update happened during the prefetch")
        return super().generate(prompts, config, on_progress)


class Updates(Callback):
    """Tell the sampler about each update."""

    def __init__(self, sampler: ConcurrentSampler) -> None:
        self.sampler = sampler

    def on_train_batch_end(self, *args: Any) -> None:
        self.sampler.updated.set()


class Run(NamedTuple):
    module: PRLModule
    watch: Watch
    sampler: ConcurrentSampler
    prompts: str
    sets: int


def fit(model: str, folder: Path, sampler: ConcurrentSampler, sets: int = 0) -> Run:
    prompts = str(write_prompts(folder / "train.jsonl"))
    held = {f"set{number}": prompts for number in range(sets)}
    module, watch = train(
        model,
        folder,
        Updates(sampler),
        sampler=sampler,
        rollout={"overlap": True},
        learning_rate=0.5,
        epochs=EPOCHS,
        accumulate=1,
        trainer={"num_sanity_val_steps": 0},
        evaluation=Evaluation(held, samples=2, pass_at=(2,)),
    )
    return Run(module, watch, sampler, prompts, sets)


@pytest.fixture(scope="module", params=[0, 1], ids=["training", "evaluating-in-between"])
def run(
    request: pytest.FixtureRequest, tied_model: str, tmp_path_factory: pytest.TempPathFactory
) -> Run:
    folder = tmp_path_factory.mktemp("overlap")
    return fit(tied_model, folder, ConcurrentSampler(), request.param)


def test_completions_are_of_the_policy_one_update_before(run: Run) -> None:
    module, watch = run.module, run.watch
    assert module.policy is not None
    assert run.sampler.calls == EPOCHS * (1 + run.sets)  # and none after the last epoch
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


def test_prompts_are_those_of_a_run_without_overlap(run: Run, tied_model: str) -> None:
    data = PromptDataModule(tied_model, run.prompts, prompts_per_epoch=4, max_prompt_tokens=16)
    data.setup("fit")
    for batch in run.watch.batches:
        trained = {
            tuple(row[:length].tolist())
            for row, length in zip(batch.input_ids, batch.prompt_lengths, strict=True)
        }
        assert trained == {tuple(prompt.token_ids) for prompt in data.next_prompts()}
        data.advance()


def test_the_engines_thread_ends(run: Run) -> None:
    for thread in threading.enumerate():
        if thread.name.startswith("prl-engine"):
            thread.join(timeout=600)  # it has been told to end
            assert not thread.is_alive()


def test_an_error_during_the_prefetch_ends_the_run(tied_model: str, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="OSError: engine_lost"):
        fit(tied_model, tmp_path, ConcurrentSampler(fails_in_call=3))


def test_a_sampler_of_this_process_cannot_overlap() -> None:
    with pytest.raises(ValueError, match=r"rollout.overlap=true.*SubprocessSampler"):
        RolloutCallback([even_digits], HFSampler(), overlap=True)
