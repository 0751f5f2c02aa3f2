"""Keep the engine's weights equal to the trainer's, and prove it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.seed import isolate_rng

from prl_lightning.data import collate
from prl_lightning.module import PRLModule
from prl_lightning.sampling import Progress, Sampler, SamplingConfig
from prl_lightning.types import Completion, Prompt, Rollout

# Mean absolute difference of token log-probabilities that precision alone explains: float32 agrees
# to 1e-5 in practice, half precision to a few hundredths.
EXPLAINED_GAP = {True: 1e-3, False: 0.1}
CHECKED_COMPLETIONS = 4  # enough tokens to see it, and a small share of a scoring pass


@dataclass(frozen=True)
class Samples:
    """Completions, and how they came about.

    Attributes:
        groups: completions of each prompt.
        step: ``trainer.global_step`` of the weights that drew them.
        seconds: the engine took.
    """

    groups: list[list[Completion]]
    step: int
    seconds: float


@dataclass(frozen=True)
class _Ahead:
    """What is being drawn while the trainer trains."""

    prompts: list[Prompt]
    config: SamplingConfig
    drawn: Future[Samples]


class EngineLink:
    """One sampler, started when first needed and told of every change of the weights.

    Args:
        sampler: the engine.
        max_gap: see RolloutCallback.
    """

    def __init__(self, sampler: Sampler, max_gap: float | None) -> None:
        self.sampler = sampler
        self.max_gap = max_gap
        self._is_started = False
        self._has_weights_of: int | None = None
        self._gap: dict[str, float] | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._ahead: _Ahead | None = None

    def take_prefetched(self, prompts: list[Prompt], config: SamplingConfig) -> Samples | None:
        """What was drawn ahead for these prompts, waited for; None where nothing was."""
        ahead = self._ahead
        if ahead is None or (_drawn_as(ahead.prompts), ahead.config) != (
            _drawn_as(prompts),
            config,
        ):
            return None
        self._ahead = None
        return ahead.drawn.result()

    def prefetch(self, prompts: list[Prompt], config: SamplingConfig) -> None:
        """Begin to draw with the weights of the last ``update``, and return at once.

        The sampler must be able to work while the trainer does; see ``Sampler.is_concurrent``.
        """
        if self._thread is None:
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prl-engine")
        self._ahead = _Ahead(prompts, config, self._thread.submit(self.draw, prompts, config))

    def draw(
        self, prompts: list[Prompt], config: SamplingConfig, on_progress: Progress | None = None
    ) -> Samples:
        """Draw with the weights of the last ``update``.

        Raises:
            RuntimeError: the engine has no weights yet, it fails, or it returns something else than
                was asked for.
        """
        step = self._has_weights_of
        if step is None:
            raise RuntimeError("the engine has no weights: call update() first")
        start = time.monotonic()
        asked = f"failed on {len(prompts)} prompts x {config.n} completions after update {step}"
        with self._as_one_error(asked):
            groups = self.sampler.generate(prompts, config, on_progress)
        _check_drawn(groups, prompts, config)
        return Samples(groups, step, time.monotonic() - start)

    def update(self, trainer: Trainer, module: PRLModule, max_model_tokens: int) -> None:
        """Start the engine if need be and give it the weights, unless it has them.

        Raises:
            RuntimeError: it does not start, or does not take them.
        """
        if self._ahead is not None:
            wait([self._ahead.drawn])  # the engine does one thing at a time
        if not self._is_started:
            self._is_started = True  # also half of an engine is to be stopped
            # An engine that seeds itself seeds the whole process.
            with isolate_rng(), self._as_one_error(f"did not start for {module.policy_name}"):
                self.sampler.start(module.policy_name, max_model_tokens)
        if self._has_weights_of != trainer.global_step:
            with self._as_one_error(f"did not take the weights of update {trainer.global_step}"):
                weights = module.weights(self.sampler.weights_dtype, self.sampler.reads_files)
                self.sampler.load_weights(weights)
            self._has_weights_of = trainer.global_step
            self._gap = None

    @contextmanager
    def _as_one_error(self, what: str) -> Iterator[None]:
        """Name the engine, what it did not do, and why."""
        try:
            yield
        except Exception as error:
            raise RuntimeError(
                f"{type(self.sampler).__name__} {what}: {type(error).__name__}: {error}. Nothing "
                "of this iteration was trained on; --ckpt_path last goes on from the last "
                "checkpoint."
            ) from error

    def forget_weights(self) -> None:
        """The trainer's weights may change without a step: a checkpoint is loaded, say."""
        self._has_weights_of = None
        self._gap = None

    def stop(self) -> None:
        """Give the engine's memory back."""
        if self._is_started:
            self.sampler.stop()
            self._is_started = False
        if self._thread is not None:
            # Not waited for: what it draws ends with the engine.
            self._thread.shutdown(wait=False, cancel_futures=True)
            self._thread = None
        self._ahead = None
        self.forget_weights()

    def check(
        self, trainer: Trainer, module: PRLModule, rollouts: list[Rollout], temperature: float
    ) -> dict[str, float]:
        """Compare log-probabilities on a few completions, once after each update.

        Args:
            trainer: knows the precision.
            module: has the policy.
            rollouts: sampled from the whole distribution at ``temperature``.
            temperature: of the sampling.

        Returns:
            Mean and largest absolute difference, of the first call since the update.

        Raises:
            RuntimeError: they differ by more than precision explains.
        """
        if self._gap is not None:
            return self._gap
        batch = collate(rollouts[:CHECKED_COMPLETIONS], 1, 1).to(module.device)
        logprobs = module.score(batch, "policy", temperature)
        gap = (logprobs - batch.rollout_logprobs).abs()[batch.completion_mask]
        mean, largest = gap.mean().item(), gap.max().item()
        is_float32 = trainer.precision == "32-true" and self.sampler.dtype == "float32"
        limit = EXPLAINED_GAP[is_float32] if self.max_gap is None else self.max_gap
        if not mean <= limit:  # so that NaN is caught as well
            raise RuntimeError(
                "engine and trainer disagree: their token log-probabilities differ by "
                f"{mean:.3g} on the mean (at most {largest:.3g}), and {limit:g} is explained by "
                "precision. Check that every weight reaches the engine (tied heads, adapters) and "
                "that both compute at the same temperature; or raise rollout.max_engine_gap."
            )
        self._gap = {"engine_gap": mean, "engine_gap_max": largest}
        return self._gap


def _drawn_as(prompts: list[Prompt]) -> list[tuple[list[int], int]]:
    """What an engine sees of prompts; a NaN in another column is not even equal to itself."""
    return [(prompt.token_ids, prompt.seed) for prompt in prompts]


def _check_drawn(
    groups: list[list[Completion]], prompts: list[Prompt], config: SamplingConfig
) -> None:
    """An engine that drops, cuts or empties something must not pass for a bad policy."""
    found = [len(group) for group in groups]
    if found != [config.n] * len(prompts):
        raise RuntimeError(
            f"the engine returned {sum(found)} completions in {len(found)} groups, but was asked "
            f"for {len(prompts)} groups of {config.n}."
        )
    for prompt, group in zip(prompts, groups, strict=True):
        for completion in group:
            tokens, logprobs = len(completion.token_ids), len(completion.logprobs)
            is_cut = not completion.finished and tokens < config.max_new_tokens
            if not 0 < tokens <= config.max_new_tokens or tokens != logprobs or is_cut:
                raise RuntimeError(
                    f"the engine returned a completion of {tokens} tokens with {logprobs} "
                    f"log-probabilities, {'finished' if completion.finished else 'not finished'}, "
                    f"for a limit of {config.max_new_tokens}: empty, cut off or incomplete. The "
                    f"prompt was {prompt.source!r:.300}."
                )
