"""Collector: one iteration, from prompts to rollouts that are ready to train on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from lightning.pytorch import Trainer

from prl_lightning.distributed import sum_over_ranks
from prl_lightning.module import PRLModule
from prl_lightning.rollouts.advantages import set_advantages
from prl_lightning.rollouts.engine_link import EngineLink, Samples
from prl_lightning.rollouts.rewarding import Rewarder
from prl_lightning.rollouts.statistics import describe
from prl_lightning.sampling import SamplingConfig
from prl_lightning.types import Prompt, Rollout


class Collector:
    """Sample, reward and compare completions. Its methods are collectives.

    Args:
        trainer: see ``EngineLink.attach``.
        module: policy, reference and objective.
        engine: attached to the trainer.
        rewarder: calls the reward functions.
        decode: turns token ids into text.

    Attributes:
        values: of the last ``collect``, by the names under which they are logged.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: PRLModule,
        engine: EngineLink,
        rewarder: Rewarder,
        decode: Callable[[list[int]], str],
    ) -> None:
        self.trainer = trainer
        self.module = module
        self.engine = engine
        self.rewarder = rewarder
        self.decode = decode
        self.values: dict[str, float] = {}

    def collect(
        self, prompts: list[Prompt], config: SamplingConfig, updates: int, micro_batches: int
    ) -> list[Rollout]:
        """One iteration: sample a group for each prompt, check the engine, reward, compare.

        Args:
            prompts: of this rank.
            config: of the sampling; ``n`` is the group size.
            updates: optimizer updates that the rollouts are used for.
            micro_batches: per update; the policy scores the rollouts in batches of this size.

        Returns:
            Rollouts that are ready to train on, groups contiguous, in the order of the prompts.
        """
        self.values = {}
        with self._timed("sampling"):
            samples = self.engine.sample(prompts, config)
        rollouts = self._rollouts(prompts, samples)
        self.values |= self.engine.check_against(rollouts, samples)
        with self._timed("reward"):
            self.values |= self.rewarder.reward(rollouts)
        over_ranks = partial(sum_over_ranks, self.trainer)
        with self._timed("scoring"):
            set_advantages(self.module, rollouts, config.n, updates, micro_batches, over_ranks)
        self._note_prefetched(samples)
        self.values |= describe(rollouts, config.n, over_ranks, self.values["sampling_seconds"])
        return rollouts

    def evaluate(self, prompts: list[Prompt], config: SamplingConfig) -> list[Rollout]:
        """Sample a group for each prompt, check the engine, reward: rollouts without advantages."""
        samples = self.engine.sample(prompts, config)
        rollouts = self._rollouts(prompts, samples)
        self.engine.check_against(rollouts, samples)
        self.rewarder.reward(rollouts)
        return rollouts

    def _rollouts(self, prompts: list[Prompt], samples: Samples) -> list[Rollout]:
        """Decode; stale samples keep the engine's log-probabilities for the importance ratio."""
        is_stale = samples.step != self.trainer.global_step
        return [
            Rollout(
                prompt,
                completion,
                self.decode(completion.token_ids),
                samples.config.temperature,
                old_logprobs=torch.tensor(completion.logprobs) if is_stale else None,
            )
            for prompt, group in zip(prompts, samples.groups, strict=True)
            for completion in group
        ]

    def _note_prefetched(self, samples: Samples) -> None:
        """With prefetching, only the wait for the engine has held up the trainer."""
        if self.engine.prefetches:
            self.values["waiting_seconds"] = self.values["sampling_seconds"]
            self.values["sampling_seconds"] = samples.seconds
            self.values["staleness"] = float(self.trainer.global_step - samples.step)

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.values[f"{what}_seconds"] = time.monotonic() - start
