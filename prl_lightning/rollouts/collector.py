"""Collector: one iteration, from prompts to rollouts that are ready to train on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.seed import isolate_rng

from prl_lightning.data.rollouts import MicroBatches
from prl_lightning.module import PRLModule
from prl_lightning.rollouts.advantages import set_advantages
from prl_lightning.rollouts.engine_link import EngineLink
from prl_lightning.rollouts.refill import IterationGroups
from prl_lightning.rollouts.rewarding import Rewarder, Scored
from prl_lightning.rollouts.sampling_queue import Samples
from prl_lightning.rollouts.statistics import describe, describe_episodes
from prl_lightning.sampling import SamplingConfig
from prl_lightning.types import Prompt, Rollout


@dataclass
class Collector:
    """Sample and reward completions and compute their advantages. All ranks must call its methods.

    Attributes:
        trainer: its ``global_step`` is the version of the weights.
        module: policy, reference and objective.
        engine: samples from the module's policy.
        rewarder: calls the reward functions.
        decode: turns token ids into text.
        metrics: metrics of the last ``collect``, logged as ``rollout/NAME``.
    """

    trainer: Trainer
    module: PRLModule
    engine: EngineLink
    rewarder: Rewarder
    decode: Callable[[list[int]], str]
    metrics: dict[str, float] = field(default_factory=dict)

    def collect(
        self, groups: IterationGroups, config: SamplingConfig, updates: int, pieces: MicroBatches
    ) -> list[Rollout]:
        """One iteration: sample a group for each prompt, check the engine, reward, compare.

        ``RolloutCallback.on_train_epoch_start`` calls this and puts the result into the
        ``RolloutBuffer``, which collates it into the batches of ``PRLModule.training_step``.

        Args:
            groups: has the prompts; it asks for more in place of groups without signal.
            config: settings of the sampling; ``n`` is the group size.
            updates: number of optimizer updates that the rollouts are used for.
            pieces: how many completions are scored at once.

        Returns:
            Rollouts that are ready to train on, groups contiguous, in the order of the prompts.
        """
        self.metrics = {}
        scored: list[Scored] = []
        is_rewarded = self.module.objective.is_rewarded
        while prompts := groups.next_prompts():
            start = time.monotonic()
            samples = self.engine.sample_iteration(prompts, config)
            self._time_sampling(samples, time.monotonic() - start)
            rollouts = self._rollouts(samples)
            self.metrics |= self.engine.check_against(rollouts, samples)
            if is_rewarded:
                with self._timed("reward"):
                    scored += self.rewarder.score(rollouts)
            groups.add(rollouts)
        if is_rewarded:
            self.metrics |= self.rewarder.summarize(scored)
        self.metrics |= groups.metrics()
        chosen = groups.chosen()
        with self._timed("scoring"):
            set_advantages(self.module, chosen, config.n, updates, pieces)
        self.engine.release()
        seconds = self.metrics["sampling_seconds"]
        self.metrics |= describe(groups.sampled, config.n, seconds, is_rewarded)
        if self.engine.episodes is not None:
            self.metrics |= describe_episodes(groups.sampled)
        return chosen

    def evaluate(
        self, sets: dict[str, list[Prompt]], config: SamplingConfig
    ) -> dict[str, list[Rollout]]:
        """Sample a group for each prompt, check the engine, reward, and compare the answers.

        All sets are sampled in one call of the engine. Each is rewarded alone, with the same random
        numbers, so that its results do not depend on the other sets.

        Args:
            sets: this rank's prompts by the name of their set.
            config: settings of the sampling; ``n`` is the group size.

        Returns:
            For each set, rollouts without advantages, groups contiguous, in the order of the
            prompts.
        """
        prompts = [prompt for own in sets.values() for prompt in own]
        samples = self.engine.sample(prompts, config)
        rollouts = self._rollouts(samples)
        self.engine.check_against(rollouts, samples)
        remaining = iter(rollouts)
        by_set = {name: list(islice(remaining, len(own) * config.n)) for name, own in sets.items()}
        for of_set in by_set.values():
            with isolate_rng():
                self.rewarder.reward(of_set, config.n)
        return by_set

    def _rollouts(self, samples: Samples) -> list[Rollout]:
        """Decode; stale samples keep the engine's log-probabilities for the importance ratio."""
        is_stale = samples.step != self.trainer.global_step
        return [
            Rollout(
                prompt,
                completion,
                self.decode(completion.token_ids),
                samples.config.logprob_temperature,
                old_logprobs=torch.tensor(completion.logprobs) if is_stale else None,
            )
            for prompt, group in zip(samples.prompts, samples.groups, strict=True)
            for completion in group
        ]

    def _time_sampling(self, samples: Samples, seconds: float) -> None:
        """Log the engine's own time apart from its start and from the wait for it."""
        self._add_seconds("sampling", samples.seconds)
        if self.engine.prefetches:
            self._add_seconds("waiting", seconds)
            self.metrics["staleness"] = float(self.trainer.global_step - samples.step)
        else:
            self._add_seconds("weights", seconds - samples.seconds)

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self._add_seconds(what, time.monotonic() - start)

    def _add_seconds(self, what: str, seconds: float) -> None:
        name = f"{what}_seconds"
        self.metrics[name] = self.metrics.get(name, 0.0) + seconds
