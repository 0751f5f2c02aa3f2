"""Load the trainer's weights into the engine, and check that both compute the same policy."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from prl_lightning.data import collate
from prl_lightning.distributed import max_over_ranks
from prl_lightning.models.sharding import checksums
from prl_lightning.module import PRLModule
from prl_lightning.rollouts.episodes import Episodes
from prl_lightning.rollouts.sampling_queue import Samples, SamplingQueue
from prl_lightning.rollouts.settings import RolloutSettings
from prl_lightning.runs.progress import sampling_bar
from prl_lightning.sampling import Progress, SamplingConfig
from prl_lightning.sampling.sample_cache import PART, SampleCache, fingerprint
from prl_lightning.types import Completion, Prompt, Rollout

# Largest mean difference of token log-probabilities that rounding can cause: float32 agrees to 1e-5
# in practice, half precision to a few hundredths.
MAX_GAP_FLOAT32 = 1e-3
MAX_GAP_HALF = 0.1
CHECKED_COMPLETIONS = 4  # enough tokens to see a gap, at a fraction of the cost of scoring


T = TypeVar("T")


class EngineLink:
    """One sampler, started on first use, whose weights follow the trainer's.

    Args:
        trainer: its ``global_step`` says how old samples are.
        module: has the policy.
        settings: have the engine.
        max_model_tokens: longest prompt plus completion.
        episodes: samples in several turns; None samples in one.

    Attributes:
        queue: samplings that run in a thread.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: PRLModule,
        settings: RolloutSettings,
        max_model_tokens: int,
        episodes: Episodes | None = None,
    ) -> None:
        self.trainer = trainer
        self.module = module
        self.sampler = settings.sampler
        self.max_gap = settings.max_engine_gap
        self.prefetches = settings.overlap
        self.max_model_tokens = max_model_tokens
        self.episodes = episodes
        self.queue = SamplingQueue()
        self._is_started = False
        # Update and checksums of the weights that the engine has when its queue is done.
        self._newest: tuple[int, list[int]] | None = None
        self._gap: dict[str, float] | None = None

    def sample(self, prompts: list[Prompt], config: SamplingConfig) -> Samples:
        """Sample ``config.n`` completions per prompt from the trainer's policy; a collective.

        Waits until all that was prefetched is sampled. Outside of ``fit``, completions are cached
        in files.

        Raises:
            RuntimeError: the engine fails, or returns something other than requested.
        """
        if self.trainer.state.fn != TrainerFn.FITTING:
            return self._sample_cached(prompts, config)
        self.update_weights()
        with sampling_bar(self.trainer, len(prompts)) as on_progress:
            return self._generate(prompts, config, self.trainer.global_step, on_progress)

    def sample_iteration(self, prompts: list[Prompt], config: SamplingConfig) -> Samples:
        """Return what was prefetched for an iteration, from an earlier policy, or sample it now.

        Raises:
            RuntimeError: see ``sample`` and ``SamplingQueue.take``.
        """
        if len(self.queue):
            return self.queue.take(prompts, config)
        return self.sample(prompts, config)

    def prefetch(self, prompts: list[Prompt], config: SamplingConfig) -> None:
        """Queue a sampling with the current weights and return at once; a collective.

        Without jobs before it, the engine gets the weights here. Otherwise it loads a copy of them
        when those jobs are done, since the trainer changes its own meanwhile. How far they are must
        not matter: it differs between ranks.

        The sampler must be able to work while the trainer does; see ``Sampler.is_concurrent``.
        """
        weights, step = None, self.trainer.global_step
        if len(self.queue):
            weights = self._hand_over(self.sampler.copy_weights)
        else:
            self.update_weights()
        work = partial(self._load_and_generate, weights, prompts, config, step)
        self.queue.put(prompts, config, work)

    def check_against(self, rollouts: list[Rollout], samples: Samples) -> dict[str, float]:
        """Compare the engine's log-probabilities with the trainer's, once after each update.

        Args:
            rollouts: of ``samples``; a few of them are scored.
            samples: nothing is compared if they come from an older policy or a nucleus (top-p).

        Returns:
            Mean and largest absolute difference per token, or {} if nothing was compared.

        Raises:
            RuntimeError: they differ by more than precision explains.
        """
        if samples.config.top_p != 1.0 or samples.step != self.trainer.global_step:
            return {}
        if self._gap is not None:
            return self._gap
        batch = collate(rollouts[:CHECKED_COMPLETIONS], 1, 1).to(self.module.device)
        logprobs = self.module.score(batch)
        gap = (logprobs - batch.rollout_logprobs).abs()[batch.completion_mask]
        mean, largest = gap.mean().item(), gap.max().item()
        is_float32 = self.trainer.precision == "32-true" and self.sampler.dtype == "float32"
        default = MAX_GAP_FLOAT32 if is_float32 else MAX_GAP_HALF
        limit = default if self.max_gap is None else self.max_gap
        # Together, so that no rank waits for another. NaN is not below the limit either.
        if not self.trainer.strategy.reduce_boolean_decision(mean <= limit):
            raise RuntimeError(
                f"engine_gap={mean:.3g}: the token log-probabilities of engine and trainer differ "
                f"by this on average (at most {largest:.3g}), but precision explains only "
                f"{limit:g}. Check that every weight reaches the engine (tied heads, adapters), or "
                "raise rollout.max_engine_gap."
            )
        self._gap = {"engine_gap": mean, "engine_gap_max": largest}
        return self._gap

    def update_weights(self) -> None:
        """Start the engine if needed, and load the trainer's weights if they have changed.

        Raises:
            RuntimeError: the engine does not start, or does not take the weights.
        """
        self.queue.wait()  # the engine does one thing at a time
        if not self._is_started:
            self._is_started = True  # so that stop() also cleans up after a failed start
            # An engine that seeds itself seeds the whole process.
            with isolate_rng(), self._engine_errors(f"did not start for {self.module.policy_name}"):
                self.sampler.start(self.module.policy_name, self.max_model_tokens)
        self._hand_over(self.sampler.load_weights)

    def release(self) -> None:
        """Let the engine free its weights, which the trainer is about to change."""
        if not len(self.queue) and self._is_started and self.sampler.release_weights():
            self._newest = None

    def _hand_over(self, take: Callable[[Iterator[tuple[str, Tensor]]], T]) -> T | None:
        """Call ``take`` with the trainer's weights if they have changed since the last call."""
        step = self.trainer.global_step
        # The update alone does not tell: callbacks such as EMAWeightAveraging swap the weights.
        own = (step, checksums(self.module.loaded_policy))
        if not self.trainer.strategy.reduce_boolean_decision(own != self._newest, all=False):
            return None
        with self._weight_errors(step):
            weights = self.module.weights(self.sampler.weights_dtype, self.sampler.reads_files)
            taken = take(weights)
        self._newest, self._gap = own, None
        return taken

    def _load_and_generate(
        self,
        weights: list[tuple[str, Tensor]] | None,
        prompts: list[Prompt],
        config: SamplingConfig,
        step: int,
    ) -> Samples:
        """Run a job of the queue; None leaves the engine's weights as they are."""
        if weights is not None:
            with self._weight_errors(step):
                self.sampler.load_weights(weights)
            weights.clear()  # the queue holds this list until the samples are there
        if not self._is_started:
            raise RuntimeError("the engine was stopped before the sampling began")
        return self._generate(prompts, config, step)

    def _generate(
        self,
        prompts: list[Prompt],
        config: SamplingConfig,
        step: int,
        on_progress: Progress | None = None,
    ) -> Samples:
        """Sample with the engine's weights, which are those of update ``step``.

        Raises:
            RuntimeError: the engine fails, or returns something else than asked.
        """
        start = time.monotonic()
        prompts = self._open(prompts)
        groups = self._sample(prompts, config, step, on_progress)
        return Samples(prompts, groups, config, step, time.monotonic() - start)

    def _open(self, prompts: list[Prompt]) -> list[Prompt]:
        """Return the prompts with what their environments say at the start."""
        return prompts if self.episodes is None else self.episodes.open(prompts)

    def _sample(
        self,
        prompts: list[Prompt],
        config: SamplingConfig,
        step: int,
        on_progress: Progress | None,
    ) -> list[list[Completion]]:
        complete = partial(self._complete, step)
        if self.episodes is None:
            return complete(prompts, config, on_progress)
        return self.episodes.sample(complete, prompts, config, on_progress)

    def _complete(
        self,
        step: int,
        prompts: list[Prompt],
        config: SamplingConfig,
        on_progress: Progress | None,
    ) -> list[list[Completion]]:
        """Call the engine once, and check what it returns."""
        asked = f"failed on {len(prompts)} prompts x {config.n} completions after update {step}"
        with self._engine_errors(asked):
            groups = self.sampler.generate(prompts, config, on_progress)
        _check_groups(config, groups, prompts)
        return groups

    def stop(self) -> None:
        """Stop the engine and free its memory."""
        is_started, self._is_started = self._is_started, False
        self.queue.cancel()  # first: no further job shall begin
        if is_started:
            self.sampler.stop()
        if self.episodes is not None:
            self.episodes.stop()

    def _sample_cached(self, prompts: list[Prompt], config: SamplingConfig) -> Samples:
        """Sample only prompts that no earlier evaluation of the same weights has sampled.

        The cache is the folder ``samples`` under ``trainer.default_root_dir``. It is written as
        groups finish, so that an interrupted evaluation continues, and one with other rewards
        samples nothing.
        """
        start, step = time.monotonic(), self.trainer.global_step
        acting = "" if self.episodes is None else self.episodes.settings.identity()
        name = fingerprint(self.module.weights(), self.sampler, config, acting)
        folder = Path(self.trainer.default_root_dir) / "samples" / name
        cache = SampleCache(folder, self.trainer.global_rank)
        prompts = self._open(prompts)
        missing = [prompt for prompt in prompts if prompt not in cache]
        if cached := (len(prompts) - len(missing)) * config.n:
            rank_zero_info(f"{cached} completions are cached in {folder} and not sampled again.")
        # If any rank has to sample, all take part in the hand-over of the weights, and in every
        # call of an engine that they share.
        most = max_over_ranks(len(missing))
        if most:
            self.update_weights()
        size = max(1, PART // config.n)
        with sampling_bar(self.trainer, len(missing)) as on_progress:
            for first in range(0, most, size):
                some = missing[first : first + size]
                # Of an episode, every turn is checked.
                check = None if self.episodes else partial(_check_groups, config)
                with cache.keeping(some, check, on_progress) as keep:
                    groups = self._sample(some, config, step, keep)
                # Of an engine that does not report its groups:
                left = [pair for pair in zip(some, groups, strict=True) if pair[0] not in cache]
                if left:
                    cache.add(*zip(*left, strict=True))
        groups = [cache[prompt] for prompt in prompts]
        return Samples(prompts, groups, config, step, time.monotonic() - start)

    def _weight_errors(self, step: int) -> AbstractContextManager[None]:
        return self._engine_errors(f"did not take the weights of update {step}")

    @contextmanager
    def _engine_errors(self, what: str) -> Iterator[None]:
        """Raise an engine's exception as a RuntimeError that names the engine and the request."""
        try:
            yield
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).rstrip('.')}."
            if "memory" in reason.lower():
                reason += (
                    " The engine's part is set by rollout.sampler.cache_gib on a CPU and by "
                    "rollout.sampler.gpu_memory_utilization on a GPU."
                )
            raise RuntimeError(
                f"{type(self.sampler).__name__} {what}: {reason} In training, --ckpt_path last "
                "continues from the last checkpoint."
            ) from error


def _check_groups(
    config: SamplingConfig, groups: list[list[Completion]], prompts: list[Prompt]
) -> None:
    """Refuse missing, empty or cut completions: they would look like a bad policy."""
    found = [len(group) for group in groups]
    if found != [config.n] * len(prompts):
        raise RuntimeError(
            f"the engine returned {sum(found)} completions in {len(found)} groups, but was asked "
            f"for {len(prompts)} groups of {config.n}."
        )
    for prompt, group in zip(prompts, groups, strict=True):
        for completion in group:
            tokens, logprobs = completion.length, len(completion.logprobs)
            is_cut = not completion.finished and tokens < config.max_new_tokens
            is_whole = tokens == logprobs == len(completion.is_sampled)
            if not 0 < tokens <= config.max_new_tokens or not is_whole or is_cut:
                raise RuntimeError(
                    f"the engine returned a completion of {tokens} tokens with {logprobs} "
                    f"log-probabilities, finished={completion.finished}, for max_new_tokens="
                    f"{config.max_new_tokens}: empty, cut or incomplete. The prompt was "
                    f"{prompt.source!r:.300}."
                )
