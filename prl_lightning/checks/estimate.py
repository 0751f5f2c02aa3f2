"""``prl check``: does a configuration fit together, and what does it ask for?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from transformers import AutoConfig

from prl_lightning.callbacks import RolloutCallback
from prl_lightning.checks.contradictions import contradictions, messages_of
from prl_lightning.data import PromptDataModule
from prl_lightning.models.causal_lm import empty_causal_lm, load_tokenizer
from prl_lightning.models.step_splitter import StepSplitter
from prl_lightning.module import PRLModule
from prl_lightning.sampling import VLLMSampler

MIB = 2**20


def complaints(
    trainer: Trainer,
    model: PRLModule,
    data: PromptDataModule,
    rollout: RolloutCallback,
    trains: bool = True,
) -> list[str]:
    """Everything that cannot work together, before anything is loaded.

    Args:
        trainer: knows the ranks.
        model: not loaded yet.
        data: not read yet.
        rollout: not started yet.
        trains: it is a run of ``fit``, and not an evaluation.

    Returns:
        One message a contradiction. What depends on the policy's files is left to the run where
        ``data.prepare`` has yet to make them.
    """
    found = contradictions(trainer, model, data, rollout, trains)
    checks: list[Callable[[], Any]] = []
    if data.prepare is None:
        sources = [*(data.train_sources if trains else []), *data.eval_sources.values()]
        checks += [source.check for source in sources]
    if _is_there(model.policy_name, data):
        unreadable = list(messages_of([lambda: _read_config(model.policy_name)]))
        if unreadable:
            return [*found, *messages_of(checks), *unreadable]
        checks += [
            lambda: rollout.check_lengths(data, model),
            lambda: StepSplitter(model.objective.steps, load_tokenizer(model.policy_name)),
        ]
    return [*found, *messages_of(checks)]


def describe(
    trainer: Trainer, model: PRLModule, data: PromptDataModule, rollout: RolloutCallback
) -> str:
    """The arithmetic of a run and an estimate of its memory, as text.

    Args:
        trainer: see ``complaints``.
        model: see there.
        data: see there.
        rollout: see there.
    """
    rollout.engine.sampler.follow(str(trainer.precision))
    lines = []
    if data.train_sources:
        longest = data.max_prompt_tokens + rollout.max_new_tokens
        completions = data.prompts_per_epoch * data.group_size
        epochs = trainer.max_epochs or 0
        lines += [
            f"epoch      {data.sizes(trainer)}",
            f"tokens     at most {completions} x ({data.max_prompt_tokens} + "
            f"{rollout.max_new_tokens}) = {completions * longest:,} an epoch",
            f"run        {epochs} epochs x {data.updates_per_epoch} = "
            f"{epochs * data.updates_per_epoch} updates"
            if epochs > 0
            else f"run        until trainer.max_steps={trainer.max_steps} or max_time",
        ]
    sets = ", ".join(data.eval_sources) or "none"
    lines.append(f"evaluation {sets}: {data.eval_group_size} samples a prompt")
    if _is_there(model.policy_name, data):
        lines += ["memory of a rank, without activations (an estimate):"]
        lines += [f"  {name:<16} {size / MIB:10,.0f} MiB" for name, size in _memory(trainer, model)]
        lines += [f"  {'engine':<16} {_engine(model, rollout)}"]
    else:
        lines.append(f"memory     {model.policy_name} is made by data.prepare; check again then")
    return "\n".join(lines)


def _read_config(name: str) -> None:
    try:
        AutoConfig.from_pretrained(name, trust_remote_code=False)
    except OSError as error:
        raise OSError(f"model.policy={name!r} cannot be read: {error}") from error


def _is_there(name: str, data: PromptDataModule) -> bool:
    """A folder that is to be made is not there yet, and no name of the Hub."""
    return data.prepare is None or Path(name).expanduser().exists()


def _parameters(name: str) -> int:
    with torch.device("meta"):
        skeleton = empty_causal_lm(name)
    return sum(parameter.numel() for parameter in skeleton.parameters())


def _memory(trainer: Trainer, model: PRLModule) -> Iterator[tuple[str, float]]:
    """Bytes a rank; strategies that shard divide by their ranks."""
    is_sharded = "FSDP" in type(trainer.strategy).__name__
    ranks = trainer.world_size if is_sharded else 1
    size = 2 if str(trainer.precision).endswith("true") and "16" in str(trainer.precision) else 4
    weights = _parameters(model.policy_name) * size / ranks
    yield "policy", weights
    if model.lora is None:
        probe = torch.nn.Parameter(torch.zeros(()))
        moments = len(_states(model.optimizer([probe]), probe))
        yield "gradient", weights
        yield f"optimizer ({moments})", weights * moments
    if model.keeps_reference and not (model.lora and model.reference_name == model.policy_name):
        yield "reference", _parameters(model.reference_name) * size / ranks


def _states(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter) -> list[str]:
    """Names of what an optimizer keeps for each entry of a parameter."""
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = optimizer.state[parameter]
    return [k for k, v in state.items() if isinstance(v, torch.Tensor) and k != "step"]


def _engine(model: PRLModule, rollout: RolloutCallback) -> str:
    sampler = rollout.engine.sampler
    sampler = getattr(sampler, "sampler", sampler)  # in a process of its own
    if not isinstance(sampler, VLLMSampler):
        return f"{type(sampler).__name__}: weights once more at most, and its cache"
    size = 4 if sampler.dtype == "float32" else 2
    weights = _parameters(model.policy_name) * size / MIB
    return (
        f"{weights:10,.0f} MiB weights, and a cache of {sampler.cache_gib:g} GiB without a GPU; "
        f"{sampler.gpu_memory_utilization:.0%} of a GPU in all"
    )
