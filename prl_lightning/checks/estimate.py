"""What a run costs: the sizes of an epoch and an estimate of the memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from lightning.pytorch import Trainer

from prl_lightning.checks.contradictions import is_available
from prl_lightning.data import PromptDataModule
from prl_lightning.models.loading import causal_lm_from_config
from prl_lightning.module import PRLModule
from prl_lightning.rollouts.settings import RolloutSettings
from prl_lightning.sampling import VLLMSampler

MIB = 2**20


def describe(
    trainer: Trainer, module: PRLModule, data: PromptDataModule, rollout: RolloutSettings
) -> str:
    """Describe the sizes of an epoch and the memory of a rank as text.

    Args:
        trainer: number of ranks, precision, limits of the run.
        module: need not be loaded.
        data: need not be read.
        rollout: settings of the sampling.
    """
    rollout.sampler.follow(str(trainer.precision))
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
    lines.append(f"evaluation {sets}: {data.evaluation.samples} samples a prompt")
    if is_available(module.policy_name, data):
        lines += ["memory of a rank, without activations (an estimate):"]
        lines += [
            f"  {name:<16} {size / MIB:10,.0f} MiB" for name, size in _memory(trainer, module)
        ]
        lines += [f"  {'engine':<16} {_engine(module, rollout)}"]
    else:
        lines.append(f"memory     unknown until data.prepare has created {module.policy_name}")
    return "\n".join(lines)


def _parameters(name: str) -> int:
    with torch.device("meta"):
        skeleton = causal_lm_from_config(name)
    return sum(parameter.numel() for parameter in skeleton.parameters())


def _memory(trainer: Trainer, module: PRLModule) -> Iterator[tuple[str, float]]:
    """Yield the bytes of a rank by purpose; strategies that shard divide by their ranks."""
    is_sharded = "FSDP" in type(trainer.strategy).__name__
    ranks = trainer.world_size if is_sharded else 1
    size = 2 if str(trainer.precision) in ("bf16-true", "16-true") else 4
    weights = _parameters(module.policy_name) * size / ranks
    yield "policy", weights
    if module.lora is None:
        probe = torch.nn.Parameter(torch.zeros(()))
        moments = len(_states(module.optimizer([probe]), probe))
        yield "gradient", weights
        yield f"optimizer ({moments})", weights * moments
    if module.loads_reference:
        yield "reference", _parameters(module.reference_name) * size / ranks


def _states(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter) -> list[str]:
    """Return the names of the tensors that an optimizer keeps per parameter."""
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = optimizer.state[parameter]
    return [k for k, v in state.items() if isinstance(v, torch.Tensor) and k != "step"]


def _engine(module: PRLModule, rollout: RolloutSettings) -> str:
    sampler = getattr(rollout.sampler, "sampler", rollout.sampler)  # inside a SubprocessSampler
    if not isinstance(sampler, VLLMSampler):
        return f"{type(sampler).__name__}: at most a second copy of the weights, and its cache"
    size = 4 if sampler.dtype == "float32" else 2
    weights = _parameters(module.policy_name) * size / MIB
    return (
        f"{weights:10,.0f} MiB weights, and a cache of {sampler.cache_gib:g} GiB without a GPU; "
        f"{sampler.gpu_memory_utilization:.0%} of a GPU in all"
    )
