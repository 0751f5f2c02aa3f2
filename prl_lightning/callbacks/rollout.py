"""RolloutCallback: Lightning's hooks around the rollouts of an iteration."""

from __future__ import annotations

import time
from functools import partial
from math import inf
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng

from prl_lightning.checks.cautions import (
    signal_hint,
    warn_of_greedy,
    warn_of_one_step,
    warn_of_slow_precision,
    warn_of_turn_end,
)
from prl_lightning.checks.contradictions import contradictions, longest_row, raise_errors
from prl_lightning.data.rollouts import MicroBatches
from prl_lightning.models.loading import stop_token_ids
from prl_lightning.rewards import RewardFunction, RewardLimits, RewardSum
from prl_lightning.rollouts.advantages import set_advantages
from prl_lightning.rollouts.collector import Collector
from prl_lightning.rollouts.engine_link import EngineLink
from prl_lightning.rollouts.episodes import Episodes
from prl_lightning.rollouts.refill import IterationGroups
from prl_lightning.rollouts.resume import ResumeState, is_between_epochs
from prl_lightning.rollouts.rewarding import Rewarder
from prl_lightning.rollouts.settings import RolloutSettings
from prl_lightning.rollouts.statistics import reduction_of
from prl_lightning.runs.heap import keep_freed_memory
from prl_lightning.runs.progress import hide_trainer_bar, print_iteration
from prl_lightning.sampling import Sampler, SamplingConfig, VLLMSampler
from prl_lightning.sampling.stops import decode, split_stops
from prl_lightning.trainer_access import (
    count_skipped,
    finish_iteration,
    has_epoch,
    prl_module,
    prompt_data,
)


def rollout_callback(trainer: Trainer) -> RolloutCallback:
    """Return the RolloutCallback of a Trainer."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return next(callback for callback in callbacks if isinstance(callback, RolloutCallback))


class RolloutCallback(Callback):
    """Sample, reward and compare completions at the start of every epoch.

    Args:
        rewards: functions with TRL's signature; their weighted sum is the outcome reward.
        sampler: the engine; vLLM by default.
        reward_weights: one per reward function, 1 by default.
        temperature: of the training samples, and of every log-probability in the loss.
        max_new_tokens: limit of a completion.
        max_engine_gap: stop if the token log-probabilities of engine and trainer differ by more
            than this on average; by default, by more than their precision explains.
        overlap: sample the next iteration's completions while this one trains. They come from the
            policy before this iteration's updates, which the importance ratio corrects. The engine
            gap is then measured only in the first iteration and in evaluations, when engine and
            trainer have the same weights.
        limits: of time and memory of the reward functions, which run in subprocesses.
        stop: texts and token ids that end a completion, as its end-of-sequence token does, also in
            evaluations. The reward functions see the completion without the text.
        refill: sample further prompts until ``prompts_per_epoch`` groups have rewards that differ,
            at most so many times ``prompts_per_epoch`` prompts an iteration. With 1, none.
        max_staleness: with ``overlap``, so many iterations are sampled ahead. Completions come from
            the policy of at most so many iterations before the one that trains on them, and the
            engine waits for the trainer only when the next ones would be older.

    Raises:
        ValueError: a value out of range, or overlap with refill or with a sampler that blocks the
            trainer.
    """

    def __init__(
        self,
        rewards: list[RewardFunction],
        sampler: Sampler | None = None,
        reward_weights: list[float] | None = None,
        temperature: float = 1.0,
        max_new_tokens: int = 1024,
        max_engine_gap: float | None = None,
        overlap: bool = False,
        limits: RewardLimits = RewardLimits(),  # noqa: B008  (frozen)
        stop: list[str | int] | None = None,
        refill: int = 1,
        max_staleness: int = 1,
    ) -> None:
        self.settings = RolloutSettings(
            rewards=RewardSum(rewards, reward_weights, limits),
            sampler=VLLMSampler() if sampler is None else sampler,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            max_engine_gap=max_engine_gap,
            overlap=overlap,
            limits=limits,
            stop=tuple(stop or ()),
            refill=refill,
            max_staleness=max_staleness,
        )
        self.engine: EngineLink | None = None
        self._has_hinted = False
        self._is_stopping = False  # at the end of this iteration

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the settings before a model is loaded, and start the reward functions.

        Raises:
            ValueError: settings contradict each other, or a column that a reward needs is missing.
        """
        data, module = prompt_data(trainer), prl_module(pl_module)
        sampler, rewards = self.settings.sampler, self.settings.rewards
        sampler.follow(str(trainer.precision))
        trains = trainer.state.fn == TrainerFn.FITTING
        errors = contradictions(trainer, module, data, self.settings, trains)
        raise_errors(errors + sampler.missing_requirements())
        if trains:
            warn_of_one_step(module, self.settings)
            warn_of_slow_precision(trainer)
            if trainer.strategy.root_device.type == "cpu":
                keep_freed_memory()
        warn_of_greedy(data)
        warn_of_turn_end(module, data, self.settings)
        for where, columns in data.reward_columns.items():
            if module.objective.is_rewarded or not where.startswith("data.train"):
                rewards.check_columns(columns, where)
        longest = longest_row(module, data, self.settings)
        sampler.refuse_model(module.policy_name, longest)
        episodes = None
        if data.environments is not None:
            episodes = Episodes(data, self.settings, trainer.num_devices)
        self.engine = EngineLink(trainer, module, self.settings, longest, episodes)
        ids, self._stop_texts = split_stops(self.settings.stop, data.tokenizer)
        self._stop_token_ids = stop_token_ids(module.policy_name, data.tokenizer, ids)
        rewards.start(ranks=trainer.num_devices)
        text_of = partial(decode, tokenizer=data.tokenizer, stop_texts=self._stop_texts)
        rewarder = Rewarder(rewards, trainer)
        self.collector = Collector(trainer, module, self.engine, rewarder, text_of)
        self.resume = ResumeState()
        self._go_last(trainer)
        hide_trainer_bar(trainer)

    def _go_last(self, trainer: Trainer) -> None:
        """Sample after every other callback's hook: some of them swap the weights."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        # A new list: Lightning iterates over the old one. Checkpoints stay the last of all.
        trainer.callbacks = sorted(  # type: ignore[attr-defined]
            callbacks, key=lambda callback: (isinstance(callback, Checkpoint), callback is self)
        )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop the engine and the processes of the reward functions."""
        self._stop()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Stop the engine and the processes of the reward functions."""
        self._stop()

    def _stop(self) -> None:
        try:
            if self.engine is not None:
                self.engine.stop()
        finally:  # also if the engine does not stop
            self.settings.rewards.stop()

    # Training

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fill the training buffer with this iteration's rollouts."""
        data = prompt_data(trainer)
        updates = data.updates_per_epoch
        config = self._sampling(data.group_size, self.settings.temperature)
        groups = IterationGroups(data, self.settings.refill)
        pieces = MicroBatches(updates * trainer.accumulate_grad_batches, data.micro_batch_tokens)
        rollouts = self.collector.collect(groups, config, updates, pieces)
        data.train_buffer.fill(rollouts)
        values = self.collector.metrics | data.train_buffer.metrics()
        values |= data.advance(groups.passed, groups.position)
        self._log(pl_module, values)
        self._hint(values, data.evaluation.solved_at)
        if self.settings.overlap:
            self._prefetch(trainer, config)

    def _prefetch(self, trainer: Trainer, config: SamplingConfig) -> None:
        """Queue iterations until as many are ahead as may be: after the first one, one each."""
        engine = self.collector.engine
        for ahead in range(len(engine.queue), self.settings.max_staleness):
            if has_epoch(trainer, ahead + 1):
                engine.prefetch(prompt_data(trainer).next_prompts(ahead), config)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the clock of a micro-batch."""
        self._batch_start = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add up the time of the micro-batches, without a validation between two of them."""
        if batch is None:
            count_skipped(trainer)
        else:
            seconds = time.monotonic() - self._batch_start
            # Not over ranks: they wait for each other in every update.
            pl_module.log("train/seconds", seconds, on_step=False, on_epoch=True, reduce_fx="sum")
        if self._is_stopping or (trainer.should_stop and trainer.fit_loop._can_stop_early):
            self._is_stopping = not trainer.is_last_batch
            finish_iteration(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell a log file how the iteration went."""
        print_iteration(trainer)

    def _log(self, module: LightningModule, values: dict[str, float]) -> None:
        self.resume.logged = values
        for name, value in values.items():
            module.log(f"rollout/{name}", value, sync_dist=True, reduce_fx=reduction_of(name))
        if "reward" in values:
            module.log("reward", values["reward"], prog_bar=True, logger=False)

    def _hint(self, values: dict[str, float], solved_at: float) -> None:
        """Say once what to do if most groups teach nothing."""
        if not self._has_hinted and (hint := signal_hint(values, solved_at, self.settings.refill)):
            self._has_hinted = True
            rank_zero_warn(hint)

    # Evaluation

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fill the evaluation buffers: all sets in one call of the engine."""
        data = prompt_data(trainer)
        settings, sets = data.evaluation, data.eval_prompts
        if not sets:
            return
        config = self._sampling(settings.samples, settings.temperature, settings.top_p)
        with isolate_rng():  # training must not depend on when it is evaluated
            rollouts = self.collector.evaluate(sets, config)
        for name, of_set in rollouts.items():
            if trainer.state.fn == TrainerFn.PREDICTING:  # predict also writes advantages
                pieces = MicroBatches(len(sets[name]))
                set_advantages(prl_module(pl_module), of_set, settings.samples, 1, pieces)
                for rollout in of_set:
                    rollout.in_loss = True  # a truncated completion is shown like the others
            data.eval_buffers[name].fill(of_set)

    on_test_epoch_start = on_validation_epoch_start
    on_predict_epoch_start = on_validation_epoch_start

    # Checkpoints

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate the initial policy before the first update, on all prompts or not at all."""
        if trainer.ckpt_path or trainer.num_sanity_val_steps != inf:
            trainer.num_sanity_val_steps = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Continue exactly where the checkpoint was saved."""
        is_resumed = self.resume.restore(trainer)
        if not trainer.fit_loop.restarted_mid_epoch:
            # With max_steps, Lightning would count the last update of the finished epoch again.
            trainer.fit_loop.epoch_loop.restarting = False
        if is_between_epochs(trainer.fit_loop):
            self.on_train_epoch_start(trainer, pl_module)
        elif is_resumed and prompt_data(trainer).train_buffer.rollouts:
            self._log(pl_module, self.resume.logged)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add what differs between ranks: random states, and values logged in this epoch."""
        self.resume.save(checkpoint, trainer)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the state until ``on_train_start``."""
        self.resume.load(checkpoint)

    def _sampling(self, n: int, temperature: float, top_p: float = 1.0) -> SamplingConfig:
        limit = self.settings.max_new_tokens
        return SamplingConfig(n, temperature, limit, self._stop_token_ids, top_p, self._stop_texts)
