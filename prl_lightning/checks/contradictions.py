"""Settings of different parts that cannot work together, each with its mend."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn

from prl_lightning.data import PromptDataModule
from prl_lightning.module import PRLModule
from prl_lightning.rewards import RewardLimits

if TYPE_CHECKING:
    from prl_lightning.callbacks.rollout import RolloutCallback


class Refused(ValueError):
    """Settings that cannot work together, all of them."""


def refuse(found: Iterable[str]) -> None:
    """Raise what has been found, all at once.

    Args:
        found: one message each; the same one is said once.

    Raises:
        Refused: there is something.
    """
    messages = list(dict.fromkeys(found))
    if messages:
        raise Refused("\n- ".join(["What is asked for cannot be done:", *messages]))


def messages_of(checks: Iterable[Callable[[], Any]]) -> Iterator[str]:
    """What the checks that fail have to say.

    Args:
        checks: raise ValueError, OSError or ImportError.
    """
    for check in checks:
        try:
            check()
        except (ValueError, OSError, ImportError) as error:
            yield str(error)


def contradictions(
    trainer: Trainer,
    module: PRLModule,
    data: PromptDataModule,
    rollout: RolloutCallback,
    trains: bool = True,
) -> list[str]:
    """What cannot work together, from the settings alone: nothing is read.

    Args:
        trainer: knows the ranks.
        module: not loaded yet.
        data: need not be read yet.
        rollout: not started yet.
        trains: it is a run of ``fit``, and not an evaluation.

    Returns:
        One message a contradiction.
    """
    found = [
        *messages_of([lambda: module.check_metrics(data)]),
        *_of_evaluation(module, data, rollout),
        *_of_limits(rollout.limits),
        *_of_engine(trainer, rollout),
    ]
    if isinstance(trainer.strategy.checkpoint_io, AsyncCheckpointIO) and trains:
        found.append(
            "trainer.plugins has AsyncCheckpointIO, which returns before the checkpoint is "
            "complete. Leave it out."
        )
    if module.reference_name != module.policy_name and not module.keeps_reference:
        found.append(
            f"model.reference={module.reference_name!r} is not used: model.objective has no KL "
            "(kl='none' or beta=0). Leave reference out, or set model.track_reference."
        )
    if module.lora is not None and importlib.util.find_spec("peft") is None:
        found.append("model.lora needs peft: install it with `pip install 'prl-lightning[lora]'`.")
    return found + (list(_of_training(trainer, module, data, rollout)) if trains else [])


def warn_of_one_step(module: PRLModule, rollout: RolloutCallback) -> None:
    """Say where no completion is long enough for a second step.

    Args:
        module: knows the steps.
        rollout: knows the longest completion.
    """
    steps = module.objective.steps
    if isinstance(steps, int) and steps >= rollout.max_new_tokens:
        rank_zero_warn(
            f"model.objective.steps={steps}, but rollout.max_new_tokens={rollout.max_new_tokens}: "
            "every completion is one step. Lower steps, or raise max_new_tokens."
        )


def _of_evaluation(
    module: PRLModule, data: PromptDataModule, rollout: RolloutCallback
) -> Iterator[str]:
    if any(k < 1 for k in module.pass_at):
        yield f"model.pass_at={list(module.pass_at)}: each k must be at least 1."
    if data.eval_group_size < 1:
        yield f"data.eval_group_size={data.eval_group_size}: must be at least 1."
    failed = rollout.limits.failure_value * sum(rollout.rewards.weights)
    if failed >= module.solved_at and rollout.limits.workers != 0:
        yield (
            f"a completion that no reward function could judge has reward {failed:g} "
            f"(rollout.limits.failure_value={rollout.limits.failure_value:g}), and counts as "
            f"correct from model.solved_at={module.solved_at:g} on. Lower failure_value, or raise "
            "solved_at."
        )


def _of_limits(limits: RewardLimits) -> Iterator[str]:
    """With ``workers: 0`` there is no limit, and an exception ends the run."""
    unused = [
        f"{field.name}={getattr(limits, field.name)}"
        for field in fields(limits)
        if field.name != "workers" and getattr(limits, field.name) != field.default
    ]
    if limits.workers == 0 and unused:
        yield (
            f"rollout.limits has {', '.join(unused)}, which need processes, and workers=0, which "
            "calls the reward functions without any. Leave out one or the other."
        )


def _of_engine(trainer: Trainer, rollout: RolloutCallback) -> Iterator[str]:
    gpus = getattr(rollout.engine.sampler, "gpus", ())  # a SubprocessSampler's
    if gpus and len(gpus) < trainer.num_devices:
        yield (
            f"rollout.sampler.gpus={list(gpus)}, but the trainer has {trainer.num_devices} "
            "processes on a machine. Name one GPU for each."
        )


def _of_training(
    trainer: Trainer, module: PRLModule, data: PromptDataModule, rollout: RolloutCallback
) -> Iterator[str]:
    if not data.train_sources:
        yield "data.train is missing: name the prompts to train on."
    yield from messages_of([lambda: data.sizes(trainer)])
    objective = module.objective
    if data.group_size == 1 and objective.outcome in ("grpo", "dr_grpo", "rloo"):
        yield (
            f"data.group_size={data.group_size}, but model.objective.outcome="
            f"{objective.outcome!r} compares the completions of a prompt. Sample 2 or more, "
            "or set outcome to 'reward'."
        )
    if rollout.overlap and objective.importance_cap is not None:
        yield (
            f"model.objective.importance_cap={objective.importance_cap} has no effect with "
            "rollout.overlap=true: the importance ratio starts from what the engine reported, so "
            "that between engine and trainer nothing is left to correct. Leave one of them out."
        )
    probe = torch.nn.Parameter(torch.zeros(1))
    for message in messages_of([lambda: module.optimizer([probe])]):
        yield f"model.optimizer cannot be made: {message}."
