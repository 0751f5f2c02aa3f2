"""Load the trainer's weights into the engine, and check that both compute the same policy."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng

from prl_lightning.data import collate
from prl_lightning.distributed import max_over_ranks
from prl_lightning.models.sharding import checksums
from prl_lightning.module import PRLModule
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


@dataclass(frozen=True)
class Samples:
    """Completions of some prompts.

    Attributes:
        groups: completions of each prompt.
        config: settings of the sampling.
        step: ``trainer.global_step`` of the weights that sampled them.
        seconds: duration of the sampling.
    """

    groups: list[list[Completion]]
    config: SamplingConfig
    step: int
    seconds: float


class EngineLink:
    """One sampler, started on first use, whose weights follow the trainer's.

    Args:
        trainer: its ``global_step`` says how old samples are.
        module: has the policy.
        settings: have the engine.
        max_model_tokens: longest prompt plus completion.
    """

    def __init__(
        self, trainer: Trainer, module: PRLModule, settings: RolloutSettings, max_model_tokens: int
    ) -> None:
        self.trainer = trainer
        self.module = module
        self.sampler = settings.sampler
        self.max_gap = settings.max_engine_gap
        self.prefetches = settings.overlap
        self.max_model_tokens = max_model_tokens
        self._is_started = False
        self._loaded: tuple[int, list[int]] | None = None  # update and checksums of the weights
        self._gap: dict[str, float] | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._prefetched: tuple[list[Prompt], SamplingConfig, Future[Samples]] | None = None

    def sample(self, prompts: list[Prompt], config: SamplingConfig) -> Samples:
        """Sample ``config.n`` completions per prompt from the trainer's policy; a collective.

        In training, completions that were prefetched for these prompts are waited for and returned;
        they come from an earlier policy. Outside of ``fit``, completions are cached in files.

        Raises:
            RuntimeError: the engine fails, or returns something other than requested.
        """
        if self.trainer.state.fn != TrainerFn.FITTING:
            return self._sample_cached(prompts, config)
        if prefetched := self._take_prefetched(prompts, config):
            return prefetched
        self.update_weights()
        with sampling_bar(self.trainer, len(prompts)) as on_progress:
            return self.generate(prompts, config, on_progress)

    def prefetch(self, prompts: list[Prompt], config: SamplingConfig) -> None:
        """Start sampling with the current weights and return at once.

        The sampler must be able to work while the trainer does; see ``Sampler.is_concurrent``.
        """
        self.update_weights()
        if self._thread is None:
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prl-engine")
        future = self._thread.submit(self.generate, prompts, config)
        self._prefetched = (prompts, config, future)

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
        if self._prefetched is not None:
            wait([self._prefetched[-1]])  # the engine does one thing at a time
        step = self.trainer.global_step
        if not self._is_started:
            self._is_started = True  # so that stop() also cleans up after a failed start
            # An engine that seeds itself seeds the whole process.
            with isolate_rng(), self._engine_errors(f"did not start for {self.module.policy_name}"):
                self.sampler.start(self.module.policy_name, self.max_model_tokens)
        # The update alone does not tell: callbacks such as EMAWeightAveraging swap the weights.
        own = (step, checksums(self.module.loaded_policy))
        if self.trainer.strategy.reduce_boolean_decision(own != self._loaded, all=False):
            with self._engine_errors(f"did not take the weights of update {step}"):
                weights = self.module.weights(self.sampler.weights_dtype, self.sampler.reads_files)
                self.sampler.load_weights(weights)
            self._loaded = own
            self._gap = None

    def generate(
        self, prompts: list[Prompt], config: SamplingConfig, on_progress: Progress | None = None
    ) -> Samples:
        """Sample with the weights of the last ``update_weights``.

        Raises:
            RuntimeError: the engine has no weights, fails, or returns something else than asked.
        """
        if self._loaded is None:
            raise RuntimeError("the engine has no weights: call update_weights() first")
        step, _ = self._loaded
        start = time.monotonic()
        asked = f"failed on {len(prompts)} prompts x {config.n} completions after update {step}"
        with self._engine_errors(asked):
            groups = self.sampler.generate(prompts, config, on_progress)
        _check_groups(config, groups, prompts)
        return Samples(groups, config, step, time.monotonic() - start)

    def stop(self) -> None:
        """Stop the engine and free its memory."""
        if self._is_started:
            self.sampler.stop()
            self._is_started = False
        if self._thread is not None:
            # Without waiting: a running generation ends with the engine.
            self._thread.shutdown(wait=False, cancel_futures=True)
            self._thread = None
        self._prefetched = None

    def _take_prefetched(self, prompts: list[Prompt], config: SamplingConfig) -> Samples | None:
        if self._prefetched is None:
            return None
        own, own_config, future = self._prefetched
        if (_inputs(own), own_config) != (_inputs(prompts), config):
            return None
        self._prefetched = None
        return future.result()

    def _sample_cached(self, prompts: list[Prompt], config: SamplingConfig) -> Samples:
        """Sample only prompts that no earlier evaluation of the same weights has sampled.

        The cache is the folder ``samples`` under ``trainer.default_root_dir``. It is written as
        groups finish, so that an interrupted evaluation continues, and one with other rewards
        samples nothing.
        """
        start = time.monotonic()
        name = fingerprint(self.module.weights(), self.sampler, config)
        folder = Path(self.trainer.default_root_dir) / "samples" / name
        cache = SampleCache(folder, self.trainer.global_rank)
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
                with cache.keeping(some, partial(_check_groups, config), on_progress) as keep:
                    groups = self.generate(some, config, keep).groups
                # Of an engine that does not report its groups:
                left = [pair for pair in zip(some, groups, strict=True) if pair[0] not in cache]
                if left:
                    cache.add(*zip(*left, strict=True))
        groups = [cache[prompt] for prompt in prompts]
        return Samples(groups, config, self.trainer.global_step, time.monotonic() - start)

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


def _inputs(prompts: list[Prompt]) -> list[tuple[list[int], int]]:
    """Return what the engine reads; columns may hold NaN, which is not equal to itself."""
    return [(prompt.token_ids, prompt.seed) for prompt in prompts]


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
