"""RolloutCallback: prompts to completions, completions to rewards, rewards to advantages."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from prl_lightning.checks.contradictions import (
    contradictions,
    refuse,
    warn_of_one_step,
)
from prl_lightning.data import PromptDataModule
from prl_lightning.data.loader import gather
from prl_lightning.models.causal_lm import max_model_tokens, stop_token_ids
from prl_lightning.module import PRLModule
from prl_lightning.rewards import RewardFunction, RewardLimits, RewardSum
from prl_lightning.rollouts.advantages import prepare_update
from prl_lightning.rollouts.engine_link import EngineLink, Samples
from prl_lightning.rollouts.resume import (
    SAVED,
    is_between_epochs,
    random_state,
    rewind_progress,
    set_random_state,
    take_own,
)
from prl_lightning.rollouts.rewarding import Rewarder
from prl_lightning.rollouts.statistics import describe, over_ranks
from prl_lightning.runs.progress import hide_bar_from_files, sampling_bar
from prl_lightning.sampling import Sampler, SamplingConfig, VLLMSampler
from prl_lightning.sampling.sample_cache import draw_kept
from prl_lightning.trainer_access import (
    is_last_epoch,
    prl_module,
    prompt_data,
    sum_over_ranks,
    train_rollouts,
)
from prl_lightning.types import Prompt, Rollout

DEFAULT_LIMITS = RewardLimits()


def rollout_callback(trainer: Trainer) -> RolloutCallback:
    """The one that samples for this Trainer."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return next(callback for callback in callbacks if isinstance(callback, RolloutCallback))


class RolloutCallback(Callback):
    """Sample, score and compare completions at the start of every epoch.

    Args:
        rewards: functions with TRL's signature; their weighted sum is the outcome reward.
        sampler: the engine; vLLM by default.
        reward_weights: one a reward function, 1 by default.
        max_new_tokens: limit of a completion.
        eval_temperature: of the evaluation samples.
        eval_top_p: of the evaluation samples.
        max_engine_gap: the run stops where engine and trainer disagree by more than this on the
            mean token log-probability; by default, by more than their precision explains.
        overlap: draw the next iteration's completions while this one trains. They are then from
            the policy before this iteration's updates, which the importance ratio corrects. The
            engine gap is measured in the first iteration and in evaluations alone, where engine
            and trainer have the same weights.
        limits: of time and memory for a reward function, which runs in processes of its own.

    Raises:
        ValueError: a limit, a temperature or a top-p that nothing can be sampled with, or overlap
            with a sampler of this process.
    """

    def __init__(
        self,
        rewards: list[RewardFunction],
        sampler: Sampler | None = None,
        reward_weights: list[float] | None = None,
        max_new_tokens: int = 1024,
        eval_temperature: float = 1.0,
        eval_top_p: float = 1.0,
        max_engine_gap: float | None = None,
        overlap: bool = False,
        limits: RewardLimits = DEFAULT_LIMITS,
    ) -> None:
        for name, value, fits in (
            ("max_new_tokens", max_new_tokens, max_new_tokens >= 1),
            ("eval_temperature", eval_temperature, eval_temperature > 0),
            ("eval_top_p", eval_top_p, 0 < eval_top_p <= 1),
        ):
            if not fits:
                raise ValueError(f"rollout.{name}={value}: must be above 0 (top-p: at most 1).")
        sampler = VLLMSampler() if sampler is None else sampler
        if overlap and not sampler.is_concurrent:
            raise ValueError(
                f"rollout.overlap=true, but {type(sampler).__name__} samples in the trainer's "
                "process. Wrap it: rollout.sampler: {class_path: "
                "prl_lightning.sampling.SubprocessSampler, init_args: {sampler: ...}}."
            )
        self.engine = EngineLink(sampler, max_engine_gap)
        self.overlap = overlap
        self.limits = limits
        self.rewards = RewardSum(rewards, reward_weights, limits)
        self.rewarder = Rewarder(self.rewards)
        self.max_new_tokens = max_new_tokens
        self.eval_temperature = eval_temperature
        self.eval_top_p = eval_top_p
        self._values: dict[str, float] = {}
        self._logged: dict[str, float] = {}
        self._saved: list[dict[str, Any]] = []
        self._put_aside: dict[str, Any] | None = None
        self._training_seconds: float | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work before anything is loaded.

        Raises:
            ValueError: settings contradict each other, a reward's column is missing, or prompt and
                completion exceed the model.
        """
        data, module = prompt_data(trainer), prl_module(pl_module)
        self.engine.sampler.follow(str(trainer.precision))
        trains = trainer.state.fn == TrainerFn.FITTING
        found = contradictions(trainer, module, data, self, trains)
        refuse([*found, *self.engine.sampler.missing_requirements()])
        if trains:
            warn_of_one_step(module, self)
        for where, columns in data.reward_columns.items():
            self.rewards.check_columns(columns, where)
        self._max_tokens = self.check_lengths(data, module)
        self._stop_token_ids = stop_token_ids(module.policy_name, data.tokenizer)
        self.engine.forget_weights()
        self.rewards.start(ranks=trainer.num_devices)
        self._saved = []
        hide_bar_from_files(trainer)

    def check_lengths(self, data: PromptDataModule, module: PRLModule) -> int:
        """The longest row, in tokens.

        Args:
            data: knows the longest prompt.
            module: knows the model.

        Raises:
            ValueError: the model does not take that many.
        """
        longest = data.max_prompt_tokens + self.max_new_tokens
        limit = max_model_tokens(module.policy_name)
        if limit is not None and longest > limit:
            raise ValueError(
                f"data.max_prompt_tokens={data.max_prompt_tokens} + rollout.max_new_tokens="
                f"{self.max_new_tokens} = {longest} tokens, but the model takes {limit}. "
                "Lower one of them."
            )
        return longest

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the engine's memory back."""
        self._stop()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """End the other processes too."""
        self._stop()

    def _stop(self) -> None:
        try:
            self.engine.stop()
        finally:  # an engine that does not end is no reason to leave processes behind
            self.rewards.stop()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate the model before the first update, and not again where a run goes on."""
        if trainer.ckpt_path:
            trainer.num_sanity_val_steps = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on exactly where the checkpoint stopped."""
        self._training_since = time.monotonic()
        saved = take_own(self._saved, trainer)
        if is_between_epochs(trainer.fit_loop):
            self.on_train_epoch_start(trainer, pl_module)
        elif saved and train_rollouts(trainer).rollouts:
            self._log(prl_module(pl_module), saved["logged"])

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add what each rank has for itself: random states, and what the epoch has logged."""
        rewind_progress(checkpoint, trainer.accumulate_grad_batches)
        own = {"random": self._put_aside or random_state(), "logged": self._logged}
        checkpoint[SAVED] = gather(own, trainer.global_rank, trainer.world_size)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep it until everything that starts has started, and drawn random numbers."""
        self._saved = checkpoint.get(SAVED, [])

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fill the training buffer with this iteration's rollouts."""
        data, module, buffer = prompt_data(trainer), prl_module(pl_module), train_rollouts(trainer)
        config = SamplingConfig(
            n=data.group_size,
            temperature=module.temperature,
            max_new_tokens=self.max_new_tokens,
            stop_token_ids=self._stop_token_ids,
        )
        rollouts = self._rollouts(trainer, module, data.next_prompts(), config)
        add_up = partial(sum_over_ranks, trainer)
        buffer.fill(rollouts, add_up)
        with self._timed("scoring"):
            prepare_update(module, buffer, data.group_size, add_up)
        self._values["completion_length_max"] = max(len(r.completion.token_ids) for r in rollouts)
        over_all = describe(rollouts, data.group_size, add_up)
        speed = over_all["tokens"] / self._values["sampling_seconds"]
        self._log(module, self._values | over_all | {"tokens_per_second": speed})
        data.advance()
        if self.overlap and not is_last_epoch(trainer):
            self.engine.update(trainer, module, self._max_tokens)
            self.engine.prefetch(data.next_prompts(), config)
        self._training_since = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the time."""
        self._training_seconds = time.monotonic() - self._training_since

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log how long the updates took, a validation inside the epoch not counted."""
        if self._training_seconds is not None:  # or the epoch had ended before the checkpoint
            pl_module.log("train/seconds", self._training_seconds, sync_dist=True)
            self._training_seconds = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the random state aside: training does not depend on when it is evaluated."""
        self._put_aside = random_state()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the random state back."""
        if self._put_aside is not None:
            set_random_state(self._put_aside)
            self._put_aside = None

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fill the evaluation buffers: all sets in one engine call."""
        data = prompt_data(trainer)
        sets = data.eval_prompts()
        prompts = [prompt for some in sets.values() for prompt in some]
        if not sets:
            return
        config = SamplingConfig(
            n=data.eval_group_size,
            temperature=self.eval_temperature,
            top_p=self.eval_top_p,
            max_new_tokens=self.max_new_tokens,
            stop_token_ids=self._stop_token_ids,
        )
        rollouts = iter(self._rollouts(trainer, prl_module(pl_module), prompts, config))
        for name, some in sets.items():
            own = [next(rollouts) for _ in range(len(some) * data.eval_group_size)]
            self.rewarder.number_answers(trainer, own, data.eval_group_size)
            data.eval_rollouts[name].fill(own)

    on_test_epoch_start = on_validation_epoch_start

    def on_predict_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fill the evaluation buffers, and compare the completions as training would."""
        self.on_validation_epoch_start(trainer, pl_module)
        data, module = prompt_data(trainer), prl_module(pl_module)
        for buffer in data.eval_rollouts.values():
            add_up = partial(sum_over_ranks, trainer)
            prepare_update(module, buffer, data.eval_group_size, add_up, is_trained=False)

    def _rollouts(
        self, trainer: Trainer, module: PRLModule, prompts: list[Prompt], config: SamplingConfig
    ) -> list[Rollout]:
        """Sampled and rewarded, groups contiguous and in the order of the prompts."""
        self._values = {}
        with self._timed("sampling"):
            drawn = self.engine.take_prefetched(prompts, config)
            if trainer.state.fn != TrainerFn.FITTING:
                drawn = draw_kept(self.engine, trainer, module, prompts, config, self._max_tokens)
            elif drawn is None:
                self.engine.update(trainer, module, self._max_tokens)
                with sampling_bar(trainer, len(prompts)) as on_progress:
                    drawn = self.engine.draw(prompts, config, on_progress)
        decode = prompt_data(trainer).tokenizer.decode
        rollouts = [
            Rollout(prompt, completion, decode(completion.token_ids, skip_special_tokens=True))
            for prompt, group in zip(prompts, drawn.groups, strict=True)
            for completion in group
        ]
        self._note_age(trainer, rollouts, drawn)
        if config.top_p == 1.0 and drawn.step == trainer.global_step:
            self._values |= self.engine.check(trainer, module, rollouts, config.temperature)
        with self._timed("reward"):
            self._values |= self.rewarder.reward(trainer, rollouts)
        return rollouts

    def _note_age(self, trainer: Trainer, rollouts: list[Rollout], drawn: Samples) -> None:
        """An older policy's completions keep its log-probabilities, for the importance ratio."""
        if not self.overlap:
            return
        self._values["waiting_seconds"] = self._values["sampling_seconds"]
        self._values["sampling_seconds"] = drawn.seconds
        self._values["staleness"] = float(trainer.global_step - drawn.step)
        if drawn.step != trainer.global_step:
            for rollout in rollouts:
                rollout.old_logprobs = torch.tensor(rollout.completion.logprobs)

    def _log(self, module: PRLModule, values: dict[str, float]) -> None:
        self._logged = values
        for name, value in values.items():
            module.log(f"rollout/{name}", value, sync_dist=True, reduce_fx=over_ranks(name))
        module.log("reward", values["reward"], prog_bar=True, logger=False)

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self._values[f"{what}_seconds"] = time.monotonic() - start
