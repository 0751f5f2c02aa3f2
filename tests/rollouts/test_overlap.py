"""Prefetching: order and age of the completions, and the policy of the importance ratio."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from interruptions import SaveAt
from prl_lightning.callbacks import RolloutCallback
from prl_lightning.data import PromptDataModule
from prl_lightning.evaluation import Evaluation
from prl_lightning.module import PRLModule
from prl_lightning.sampling import (
    HFSampler,
    NCCLTransfer,
    Progress,
    SamplingConfig,
    VLLMServerSampler,
)
from prl_lightning.trainer_access import prompt_data
from prl_lightning.types import Completion, Prompt, RolloutBatch
from sample_rewards import even_digits
from tiny_runs import write_prompts
from trainer_runs import Watch, train

pytestmark = pytest.mark.process

EPOCHS = 5
TIMEOUT = 600.0  # seconds; without overlap the sampler would wait forever


class ConcurrentSampler(HFSampler):
    """A late one returns the samples of an iteration only after the last update before it.

    It then has loaded its weights when the trainer's are newer. With one that is not late, the
    trainer waits in each iteration until all that may be sampled ahead is there.
    """

    is_concurrent = loads_in_thread = True

    def __init__(
        self, max_staleness: int = 1, is_late: bool = True, fails_in_call: int | None = None
    ) -> None:
        super().__init__()
        self.max_staleness = max_staleness
        self.is_late = is_late
        self.fails_in_call = fails_in_call
        self.calls = 0
        self.loads_in_another_thread = 0
        self.ahead = 0  # iterations whose prefetch has begun
        self.finished = 0
        self.updates = 0
        self.changed = threading.Condition()

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.loads_in_another_thread += is_another_thread()
        super().load_weights(weights)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        with self.changed:
            if not self.changed.wait_for(condition, TIMEOUT):
                raise TimeoutError("engine and trainer wait for each other")

    def count(self, what: str) -> None:
        with self.changed:
            setattr(self, what, getattr(self, what) + 1)
            self.changed.notify_all()

    def generate(
        self, prompts: Sequence[Prompt], config: SamplingConfig, on_progress: Progress | None = None
    ) -> list[list[Completion]]:
        self.calls += 1
        if self.calls == self.fails_in_call:
            raise OSError("engine_lost")
        if not is_another_thread():
            return super().generate(prompts, config, on_progress)
        self.count("ahead")
        if self.is_late:
            self.wait_for(lambda: self.updates >= self.ahead)
        groups = super().generate(prompts, config, on_progress)
        self.count("finished")
        return groups


def prompts_of(batch: RolloutBatch) -> set[tuple[int, ...]]:
    rows = zip(batch.input_ids, batch.prompt_lengths, strict=True)
    return {tuple(row[:length].tolist()) for row, length in rows}


def is_another_thread() -> bool:
    return threading.current_thread() is not threading.main_thread()


class Updates(Callback):
    """Tell the sampler about each update, and wait for one that is not late."""

    def __init__(self, sampler: ConcurrentSampler) -> None:
        self.sampler = sampler

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        sampler = self.sampler
        if not sampler.is_late:
            ahead = min(trainer.current_epoch + sampler.max_staleness, EPOCHS - 1)
            sampler.wait_for(lambda: sampler.finished >= ahead)
        sampler.count("updates")


class Run(NamedTuple):
    module: PRLModule
    watch: Watch
    sampler: ConcurrentSampler
    prompts: str
    sets: int


def fit(
    model: str, folder: Path, sampler: ConcurrentSampler, sets: int = 0, *callbacks: Callback,
    checkpoint: Path | None = None, updates: int = 1,
) -> Run:  # fmt: skip
    prompts = str(write_prompts(folder / "train.jsonl"))
    held = {f"set{number}": prompts for number in range(sets)}
    module, watch = train(
        model,
        folder,
        Updates(sampler),
        *callbacks,
        sampler=sampler,
        rollout={"overlap": True, "max_staleness": sampler.max_staleness},
        learning_rate=0.5,
        epochs=EPOCHS,
        accumulate=1,
        trainer={"num_sanity_val_steps": 0},
        evaluation=Evaluation(held, samples=2, pass_at=(2,)),
        checkpoint=checkpoint,
        updates_per_epoch=updates,
    )
    return Run(module, watch, sampler, prompts, sets)


# Of the bound, whether the engine is late, and the number of evaluation sets.
RUNS = {
    "training": (1, True, 0),
    "evaluating-in-between": (1, True, 1),
    "late": (3, True, 0),
    "early": (2, False, 0),
    "early-and-evaluating": (2, False, 1),
}


@pytest.fixture(scope="module", params=RUNS.values(), ids=RUNS)
def run(
    request: pytest.FixtureRequest, tied_model: str, tmp_path_factory: pytest.TempPathFactory
) -> Run:
    folder = tmp_path_factory.mktemp("overlap")
    max_staleness, is_late, sets = request.param
    return fit(tied_model, folder, ConcurrentSampler(max_staleness, is_late), sets)


def test_completions_are_of_the_policy_that_was_there_when_they_were_queued(run: Run) -> None:
    """With one update an iteration; of all policies of the run, only that one fits."""
    module, watch, bound = run.module, run.watch, run.sampler.max_staleness
    assert module.policy is not None
    assert run.sampler.calls == EPOCHS * (1 + run.sets)  # and none after the last epoch
    ages = [min(epoch, bound) for epoch in range(EPOCHS)]
    assert [values["rollout/staleness"] for values in watch.values] == ages
    assert watch.batches[0].old_logprobs is None
    for epoch in range(1, EPOCHS):
        batch = watch.batches[epoch]
        mask, old = batch.completion_mask, batch.old_logprobs
        assert old is not None
        gaps = []
        for weights in watch.weights[: epoch + 1]:
            module.policy.load_state_dict(weights)
            with torch.no_grad():
                gaps.append((module.policy(batch)[0] - old).abs()[mask].max().item())
        assert gaps.pop(epoch - ages[epoch]) < 1e-4
        assert min(gaps) > 1e-3  # the ratio has something to correct
        assert watch.values[epoch]["train/ratio_max"] > 1.0


def test_only_a_busy_engine_loads_weights_in_its_thread(run: Run) -> None:
    """The first jobs find their weights in the engine, each later one loads its own.

    An evaluation leaves the engine idle and with the newest weights.
    """
    bound = run.sampler.max_staleness
    is_busy = bound > 1 and not run.sets
    assert run.sampler.loads_in_another_thread == (EPOCHS - 1 - bound if is_busy else 0)


@pytest.mark.parametrize(
    ("hook", "ages", "resumed"),
    [
        ("on_train_epoch_end", [0, 2, 4, 4, 4], [0, 2, 4]),
        ("on_train_batch_end", [0, 2, 4, 4, 4], [2, 0, 2, 4]),  # between the updates of epoch 1
    ],
)
def test_samples_in_flight_at_a_checkpoint_are_sampled_again(
    hook: str, ages: list[int], resumed: list[int], tied_model: str, tmp_path: Path
) -> None:
    """With the newest weights; the samples that an unfinished epoch trains on are kept."""
    file = tmp_path / "saved.ckpt"
    save = SaveAt(hook, {"on_train_epoch_end": 1, "on_train_batch_end": 2}[hook], str(file))
    whole, rest = (
        fit(tied_model, tmp_path, ConcurrentSampler(2), 0, *saves, checkpoint=checkpoint, updates=2)
        for saves, checkpoint in (([save], None), ([], file))
    )
    assert [values["rollout/staleness"] for values in whole.watch.values] == ages
    assert [values["rollout/staleness"] for values in rest.watch.values] == resumed
    first = 4 if hook == "on_train_epoch_end" else 3
    ours, others = (list(map(prompts_of, run.watch.batches)) for run in (rest, whole))
    assert ours == others[first:]


def test_prompts_that_change_after_they_were_sampled_end_the_run(
    tied_model: str, tmp_path: Path
) -> None:
    class Skip(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            prompt_data(trainer).prompts_seen += 1

    with pytest.raises(RuntimeError, match=r"rollout\.overlap: the 4 prompts.*max_staleness=1"):
        fit(tied_model, tmp_path, ConcurrentSampler(2), 0, Skip())


def test_prompts_are_those_of_a_run_without_overlap(run: Run, tied_model: str) -> None:
    data = PromptDataModule(tied_model, run.prompts, prompts_per_epoch=4, max_prompt_tokens=16)
    data.setup("fit")
    for batch in run.watch.batches:
        assert prompts_of(batch) == {tuple(prompt.token_ids) for prompt in data.next_prompts()}
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


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_staleness": 0, "overlap": True}, r"max_staleness=0: must be at least 1"),
        ({"max_staleness": 2}, r"max_staleness=2 has no effect.*overlap=true"),
        ({"max_staleness": 2, "overlap": True}, r"max_staleness=2.*loads_in_thread=False"),
    ],
)
def test_bounds_that_cannot_work(options: dict[str, Any], words: str) -> None:
    sampler = VLLMServerSampler(transfer=NCCLTransfer())  # NCCL in two threads can hang
    with pytest.raises(ValueError, match=words):
        RolloutCallback([even_digits], sampler, **options)
