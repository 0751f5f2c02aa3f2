"""Settings of different sections that cannot work together, each with its fix."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from torch.optim.lr_scheduler import ReduceLROnPlateau

from prl_lightning.checks.lightning_options import lightning_errors, strategy_errors
from prl_lightning.data import PromptDataModule
from prl_lightning.models.loading import (
    load_config,
    load_policy,
    load_tokenizer,
    max_model_tokens,
    stop_token_ids,
    why_unreadable,
)
from prl_lightning.models.step_splitter import StepSplitter
from prl_lightning.models.vocabulary import check_vocabulary
from prl_lightning.module import PRLModule
from prl_lightning.rewards import EnvironmentReward, RewardLimits
from prl_lightning.rollouts.settings import RolloutSettings
from prl_lightning.sampling.engine_ranks import indivisible_ranks
from prl_lightning.sampling.stops import split_stops


class ConfigurationError(ValueError):
    """All errors of a configuration."""


def raise_errors(errors: Iterable[str]) -> None:
    """Raise one exception for all errors.

    Args:
        errors: messages; duplicates are dropped.

    Raises:
        ConfigurationError: there is at least one.
    """
    messages = list(dict.fromkeys(errors))
    if messages:
        raise ConfigurationError("\n- ".join(["The configuration cannot work:", *messages]))


def errors_of(*checks: Callable[[], Any]) -> Iterator[str]:
    """Yield the messages of checks that raise ValueError, OSError or ImportError."""
    for check in checks:
        try:
            check()
        except (ValueError, OSError, ImportError) as error:
            yield str(error)


def contradictions(
    trainer: Trainer,
    module: PRLModule,
    data: PromptDataModule,
    rollout: RolloutSettings,
    trains: bool,
) -> list[str]:
    """Find settings that cannot work together, without reading a file.

    Args:
        trainer: number of ranks, strategy.
        module: need not be loaded.
        data: need not be read.
        rollout: settings of the sampling.
        trains: for a run of ``fit``, not for an evaluation.

    Returns:
        One message per contradiction.
    """
    errors = [
        *errors_of(module.objective.check_names),
        *_of_rewards(data, rollout),
        *_of_tasks(data, rollout, trains),
        *_of_environments(data, rollout),
        *_of_limits(rollout.limits),
        *_of_engine(trainer, rollout),
        *strategy_errors(trainer),
    ]
    if isinstance(trainer.strategy.checkpoint_io, AsyncCheckpointIO) and trains:
        errors.append(
            "trainer.plugins has AsyncCheckpointIO, which returns before the checkpoint is "
            "complete. Leave it out."
        )
    if module.reference_name != module.policy_name and not module.references:
        errors.append(
            f"model.reference={module.reference_name!r} is not used: model.objective has no KL "
            "(kl='none' or beta=0). Leave reference out, or set model.track_reference."
        )
    if module.objective.references and module.other_reference:
        errors.append(
            f"{module.other_reference} has no effect with model.objective.references: name the "
            "model there, with beta 0 if it shall only be logged."
        )
    if module.lora is not None and importlib.util.find_spec("peft") is None:
        errors.append("model.lora needs peft: run `pip install 'prl-lightning[lora]'`.")
    return errors + (list(_of_training(trainer, module, data, rollout)) if trains else [])


def file_errors(
    module: PRLModule, data: PromptDataModule, rollout: RolloutSettings, trains: bool
) -> list[str]:
    """Find missing or unsuitable files of data and model, without loading weights.

    Args:
        module: see ``contradictions``.
        data: see ``contradictions``. Files that ``data.prepare`` has yet to create are skipped.
        rollout: see ``contradictions``.
        trains: see ``contradictions``.

    Returns:
        One message per error.
    """
    checks = [source.check for source in data.sources(trains)]
    errors = [] if data.prepare else list(errors_of(*checks))
    if not is_available(module.policy_name, data):
        return errors
    unreadable = list(errors_of(lambda: _read_config(module.policy_name)))
    if unreadable:
        return errors + unreadable
    return [
        *errors,
        *errors_of(
            lambda: rollout.sampler.refuse_model(
                module.policy_name, longest_row(module, data, rollout)
            ),
            lambda: load_policy(module.policy_name, module.lora, with_weights=False),
            lambda: StepSplitter(module.objective.steps, load_tokenizer(module.policy_name)),
            lambda: _check_stops(module.policy_name, rollout),
            *(
                partial(check_vocabulary, module.policy_name, source)
                for source in module.references.sources().values()
                if is_available(source, data)
            ),
        ),
    ]


def is_available(name: str, data: PromptDataModule) -> bool:
    """Whether a model can be read now; False if ``data.prepare`` may have yet to create it."""
    return data.prepare is None or Path(name).expanduser().exists()


def longest_row(module: PRLModule, data: PromptDataModule, rollout: RolloutSettings) -> int:
    """Return the largest number of tokens of a prompt with its completion.

    Raises:
        ValueError: it exceeds what the model can take.
    """
    added = 0 if data.environments is None else data.environments.result_tokens  # by reset()
    longest = data.max_prompt_tokens + added + rollout.max_new_tokens
    limit = max_model_tokens(module.policy_name)
    if limit is not None and longest > limit:
        raise ValueError(
            f"data.max_prompt_tokens={data.max_prompt_tokens} + rollout.max_new_tokens="
            f"{rollout.max_new_tokens} = {longest} tokens, but the model takes {limit}. "
            "Lower one of them."
        )
    return longest


def _check_stops(name: str, rollout: RolloutSettings) -> None:
    tokenizer = load_tokenizer(name)
    stop_token_ids(name, tokenizer, split_stops(rollout.stop, tokenizer)[0])


def _read_config(name: str) -> None:
    try:
        load_config(name)
    except OSError as error:
        why = why_unreadable(name, error)
        raise OSError(f"model.policy={name!r} cannot be read: {why}") from error


def _of_rewards(data: PromptDataModule, rollout: RolloutSettings) -> Iterator[str]:
    failed = rollout.limits.failure_value * sum(rollout.rewards.weights)
    solved_at = data.evaluation.solved_at
    if failed >= solved_at and rollout.limits.workers != 0:
        yield (
            f"rollout.limits.failure_value={rollout.limits.failure_value:g} gives a completion on "
            f"which every reward function failed a reward of {failed:g}, which counts as correct "
            f"from evaluation.solved_at={solved_at:g}. Lower failure_value, or raise solved_at."
        )


def _of_tasks(data: PromptDataModule, rollout: RolloutSettings, trains: bool) -> Iterator[str]:
    """Tasks of a mixture that a reward function refuses."""
    tasks = {task for source in data.sources(trains) for task in getattr(source, "tasks", ())}
    for function in rollout.rewards.functions:
        if hasattr(function, "check_tasks"):
            yield from errors_of(partial(function.check_tasks, tasks))


def _of_environments(data: PromptDataModule, rollout: RolloutSettings) -> Iterator[str]:
    given = any(isinstance(one, EnvironmentReward) for one in rollout.rewards.functions)
    if data.environments is None:
        if given:
            yield "rollout.rewards has EnvironmentReward, but there are no data.environments."
        return
    turn = data.environments.tokens_of_turn(rollout.max_new_tokens)
    if turn > rollout.max_new_tokens:
        yield (
            f"data.environments.turn_tokens={turn} is above rollout.max_new_tokens="
            f"{rollout.max_new_tokens}, the limit of a whole episode. Lower it."
        )
    if given and not data.environments.factories:
        yield "rollout.rewards has EnvironmentReward, but data.environments has tools alone."
    if rollout.limits.workers == 0:
        yield (
            "rollout.limits.workers=0, but environments always run in processes of their own. "
            "Leave it out."
        )
    if texts := [stop for stop in rollout.stop if isinstance(stop, str)]:
        yield (
            f"rollout.stop has the texts {texts}, which would end each turn of an episode. Name "
            "tokens, or leave it out: data.environments.format has what ends a call."
        )


def _of_limits(limits: RewardLimits) -> Iterator[str]:
    """With ``workers: 0`` there are no limits, and an exception ends the run."""
    unused = [
        f"{field.name}={getattr(limits, field.name)}"
        for field in fields(limits)
        if field.name != "workers" and getattr(limits, field.name) != field.default
    ]
    if limits.workers == 0 and unused:
        yield (
            f"rollout.limits has {', '.join(unused)}, but workers=0 calls the reward functions in "
            "the trainer's process, without limits. Leave one of them out."
        )


def _of_engine(trainer: Trainer, rollout: RolloutSettings) -> Iterator[str]:
    gpus = getattr(rollout.sampler, "gpus", ())  # of a SubprocessSampler
    if gpus and len(gpus) < trainer.num_devices:
        yield (
            f"rollout.sampler.gpus={list(gpus)}, but the trainer has {trainer.num_devices} "
            "processes on a machine. Name one GPU for each."
        )
    if trainer.world_size % rollout.sampler.ranks_per_engine:
        yield indivisible_ranks(rollout.sampler.ranks_per_engine, trainer.world_size)


def _of_training(
    trainer: Trainer, module: PRLModule, data: PromptDataModule, rollout: RolloutSettings
) -> Iterator[str]:
    if not data.train_sources:
        yield "data.train is missing: name the prompts to train on."
    if data.group_size == 1 and rollout.refill > 1:
        yield (
            f"data.group_size={data.group_size}, but rollout.refill={rollout.refill} waits for "
            "groups whose rewards differ. Sample 2 or more, or leave refill out."
        )
    yield from errors_of(lambda: data.sizes(trainer))
    objective = module.objective
    compares = ("grpo", "dr_grpo", "rloo", "maxrl", "batch_std")
    if data.group_size == 1 and objective.outcome in compares:
        yield (
            f"data.group_size={data.group_size}, but model.objective.outcome="
            f"{objective.outcome!r} compares the completions of a prompt. Sample 2 or more, "
            "or set outcome to 'reward'."
        )
    for name, one in objective.references.items():
        is_last_policy = one.kind == "moving" and one.every * data.updates_per_epoch == 1
        if one.target is not None and is_last_policy:
            yield (
                f"model.objective.references.{name}.target={one.target} with kind='moving', "
                "every=1 and data.updates_per_epoch=1: the KL is measured before the update, where "
                "it is 0. Set every or updates_per_epoch to 2 or more, or leave the target out."
            )
    if rollout.refill > 1 and not objective.is_rewarded:
        yield (
            f"rollout.refill={rollout.refill}, but model.objective.outcome='none' has no rewards "
            "that could differ within a group. Leave one of them out."
        )
    if rollout.overlap and objective.engine_correction is not None:
        yield (
            "model.objective.engine_correction has no effect with rollout.overlap=true: the "
            "importance ratio already starts from the engine's log-probabilities. Leave one of "
            "them out."
        )
    yield from _of_staleness(data, rollout)
    yield from _of_optimizer(module)
    yield from lightning_errors(trainer, data)


def _of_staleness(data: PromptDataModule, rollout: RolloutSettings) -> Iterator[str]:
    """Prompts that depend on the results of iterations which are not trained on yet."""
    names = ["data.difficulty"] if data.difficulty is not None else []
    names += [
        f"data.train has {type(source).__name__} with a curriculum"
        for source in data.train_sources
        if getattr(source, "curriculum", None) is not None
    ]
    if rollout.max_staleness > 1 and names:
        yield (
            f"rollout.max_staleness={rollout.max_staleness} samples iterations ahead whose prompts "
            f"depend on results that are not there yet: {' and '.join(names)}. Leave that out, or "
            "set max_staleness=1."
        )


def _of_optimizer(module: PRLModule) -> Iterator[str]:
    probe = torch.nn.Parameter(torch.zeros(1))
    errors = [
        f"model.optimizer cannot be created: {message}."
        for message in errors_of(lambda: module.optimizer([probe]))
    ]
    yield from errors
    schedule = module.lr_scheduler
    if errors or schedule is None:
        return
    made: list[Any] = []
    for message in errors_of(lambda: made.append(schedule(module.optimizer([probe])))):
        yield f"model.lr_scheduler cannot be created: {message}."
    if made and isinstance(made[0], ReduceLROnPlateau):
        monitor = getattr(made[0], "monitor", None)
        yield (
            f"model.lr_scheduler={type(made[0]).__name__}(monitor={monitor!r}) waits for a metric, "
            "but the schedule steps once per update, when none is known. Use one that counts "
            "updates, such as torch.optim.lr_scheduler.LinearLR."
        )
