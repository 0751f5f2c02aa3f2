"""What a run costs: the sizes of an epoch, estimates of memory and time."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from prl_lightning.checks.contradictions import is_available
from prl_lightning.checks.duration import describe_duration
from prl_lightning.data import PromptDataModule, collate
from prl_lightning.functional.logprobs import _CHUNK_ELEMENTS
from prl_lightning.models.causal_lm import LogprobModel
from prl_lightning.models.loading import causal_lm_from_config, load_config
from prl_lightning.models.sharding import is_sharding
from prl_lightning.module import PRLModule
from prl_lightning.rollouts.settings import RolloutSettings
from prl_lightning.sampling import Sampler, VLLMSampler, VLLMServerSampler
from prl_lightning.types import Completion, Prompt, Rollout

MIB = 2**20
# It prints a traceback for every operation that it cannot imitate.
logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
# Measured on a CPU, after the first update, without weights: Python, torch, transformers and the
# callbacks; vLLM needs as much again.
CODE_BYTES = 640 * MIB
PROBE_TOKENS = 64


def describe(
    trainer: Trainer,
    module: PRLModule,
    data: PromptDataModule,
    rollout: RolloutSettings,
    gpu: str | None = None,
) -> str:
    """Describe the sizes of an epoch, the memory of a rank and the time of an iteration as text.

    Args:
        trainer: number of ranks, precision, limits of the run.
        module: need not be loaded.
        data: need not be read.
        rollout: settings of the sampling.
        gpu: whose time is estimated, such as "H100"; by default this machine's hardware.

    Raises:
        ConfigurationError: the GPU is not known.
    """
    rollout.sampler.follow(str(trainer.precision))
    lines = []
    if data.train_sources:
        longest = data.max_prompt_tokens + rollout.max_new_tokens
        completions = rollout.refill * data.prompts_per_epoch * data.group_size
        epochs = trainer.max_epochs or 0
        lines += [
            f"epoch      {data.sizes(trainer)}",
            *_refilled(data, rollout),
            f"tokens     at most {completions} x ({data.max_prompt_tokens} + "
            f"{rollout.max_new_tokens}) = {completions * longest:,} an epoch",
            f"run        {epochs} epochs x {data.updates_per_epoch} = "
            f"{epochs * data.updates_per_epoch} updates"
            if epochs > 0
            else f"run        until trainer.max_steps={trainer.max_steps} or max_time",
        ]
    else:
        lines.append("training   none: data.train is not set, which prl fit needs")
    sets = ", ".join(data.eval_sources) or "none"
    lines.append(f"evaluation {sets}: {data.evaluation.samples} samples a prompt")
    if is_available(module.policy_name, data):
        parts = list(_memory(trainer, module, bool(data.train_sources)))
        lines += ["memory of a rank (an estimate):"]
        lines += [f"  {name:<16} {size / MIB:10,.0f} MiB" for name, size in parts]
        lines += [f"  {'engine':<16} {_engine(module, rollout)}"]
        lines += _beside_weights(trainer, module, data, rollout, sum(size for _, size in parts))
        if data.train_sources:
            lines += describe_duration(trainer, module, data, rollout, gpu)
    else:
        lines.append(
            f"memory     and time are unknown until data.prepare has created {module.policy_name}"
        )
    return "\n".join(lines)


def _refilled(data: PromptDataModule, rollout: RolloutSettings) -> Iterator[str]:
    if rollout.refill > 1:
        prompts = rollout.refill * data.prompts_per_epoch
        yield (
            f"refill     at most {rollout.refill} x {data.prompts_per_epoch} = {prompts} prompts x "
            f"{data.group_size} completions sampled an epoch"
        )


def _parameters(name: str) -> int:
    with torch.device("meta"):
        skeleton = causal_lm_from_config(name)
    return sum(parameter.numel() for parameter in skeleton.parameters())


def _memory(trainer: Trainer, module: PRLModule, trains: bool) -> Iterator[tuple[str, float]]:
    """Yield the bytes of weights and states by purpose; strategies that shard divide by ranks."""
    strategy = trainer.strategy
    copies = getattr(strategy, "replicas", 1)  # of an FSDP2Strategy
    ranks = trainer.world_size // copies if is_sharding(strategy) else 1
    size = 2 if str(trainer.precision) in ("bf16-true", "16-true") else 4
    weights = _parameters(module.policy_name) * size / ranks
    yield "policy", weights
    if module.lora is None and trains:
        yield "gradient", weights
        yield "optimizer", weights * _state_share(module)
    sources = module.references.sources()
    for key, source in sources.items():
        name = "reference" if len(sources) == 1 else f"reference {key}"
        yield name, _parameters(source) * size / ranks


def _state_share(module: PRLModule) -> float:
    """Return the bytes that the optimizer keeps for a byte of weights; 2 for AdamW."""
    # Large enough for optimizers that keep small matrices in full precision.
    probe = torch.nn.Parameter(torch.zeros(128, 128))
    optimizer = module.optimizer([probe])
    probe.grad = torch.zeros_like(probe)
    optimizer.step()
    state = optimizer.state[probe].values()
    tensors = (value for value in state if isinstance(value, Tensor) and value.ndim)  # no counter
    return sum(_held_bytes(tensor) for tensor in tensors) / probe.nbytes


def _held_bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor, or of those that a wrapper such as torchao's consists of."""
    if not is_traceable_wrapper_subclass(tensor):
        return tensor.nbytes
    names, _ = tensor.__tensor_flatten__()
    return sum(_held_bytes(getattr(tensor, name)) for name in names)


def _beside_weights(
    trainer: Trainer,
    module: PRLModule,
    data: PromptDataModule,
    rollout: RolloutSettings,
    weights: float,
) -> Iterator[str]:
    """Describe a micro-batch's memory, and without a GPU the code's and the sum of everything."""
    total = weights
    if data.train_sources:
        sizes = data.sizes(trainer)
        rows = sizes.prompts * sizes.group_size // sizes.updates // sizes.ranks
        tokens = rows // sizes.micro_batches * (data.max_prompt_tokens + rollout.max_new_tokens)
        per_token = _activations(module, str(trainer.precision))
        vocabulary = load_config(module.policy_name).get_text_config().vocab_size
        chunk = _CHUNK_ELEMENTS.get(trainer.strategy.root_device.type, _CHUNK_ELEMENTS["cpu"])
        logits = 2 * 4 * min(tokens * vocabulary, chunk)  # two buffers in float32
        total += tokens * (per_token or 0) + logits
        yield f"  {'activations':<16} " + (
            "unknown for this architecture, and not in the sum"
            if per_token is None
            else f"{tokens * per_token / MIB:10,.0f} MiB at most: {per_token / 1024:,.0f} KiB a "
            f"token, {tokens:,} tokens in a micro-batch at the limits"
        )
        yield f"  {'logits':<16} {logits / MIB:10,.0f} MiB at most, in chunks"
    if trainer.strategy.root_device.type != "cpu":
        return
    sampler, engine = _engine_weights(module, rollout)
    code = CODE_BYTES
    if isinstance(sampler, VLLMSampler):
        code, engine = 2 * code, engine + sampler.cache_gib * 2**30
    yield f"  {'code':<16} {code / MIB:10,.0f} MiB of Python, torch and the engine"
    yield f"  {'in all':<16} {(total + code + engine) / MIB:10,.0f} MiB at most, without a GPU"


def _activations(module: PRLModule, precision: str) -> float | None:
    """Return the bytes that autograd keeps for a token, or None if they cannot be counted."""
    is_half = precision in ("bf16-true", "16-true")
    # Kernels for experts refuse float32 on tensors without memory: count half of it.
    for dtype, factor in (
        (torch.bfloat16 if is_half else torch.float32, 1.0),
        (torch.bfloat16, 2.0),
    ):
        with suppress(RuntimeError, ValueError, NotImplementedError):
            return factor * _kept_bytes(module, dtype, precision.endswith("-mixed"))
    return None


def _kept_bytes(module: PRLModule, dtype: torch.dtype, is_mixed: bool) -> float:
    """Count on tensors without memory; with LoRA autograd keeps fewer."""
    completion = Completion([0] * PROBE_TOKENS, [0.0] * PROBE_TOKENS, True)
    batch = collate([Rollout(Prompt([0], ""), completion, "")], 1, 1)
    kept: dict[Any, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.device("meta"):
        model = causal_lm_from_config(module.policy_name, dtype)
        policy = LogprobModel(model, module.gradient_checkpointing).train()
    with FakeTensorMode(allow_non_fake_inputs=True):
        tensors = chain(policy.named_parameters(), policy.named_buffers())
        held = {
            name: torch.empty(x.shape, dtype=x.dtype, requires_grad=x.requires_grad)
            for name, x in tensors
        }
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=is_mixed),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            functional_call(policy, held, (batch,))
        for tensor in held.values():
            kept.pop(tensor.untyped_storage(), None)
    return sum(kept.values()) / PROBE_TOKENS


def _engine_weights(module: PRLModule, rollout: RolloutSettings) -> tuple[Sampler, float]:
    """Return the sampler that has the engine, and the bytes of a rank's part of its weights."""
    sampler = getattr(rollout.sampler, "sampler", rollout.sampler)  # inside a SubprocessSampler
    size = 4 if sampler.dtype == "float32" else 2
    return sampler, _parameters(module.policy_name) * size / sampler.ranks_per_engine


def _engine(module: PRLModule, rollout: RolloutSettings) -> str:
    sampler, weights = _engine_weights(module, rollout)
    if isinstance(sampler, VLLMServerSampler):
        return f"on the vLLM server {sampler.url}"
    if not isinstance(sampler, VLLMSampler):
        return f"{type(sampler).__name__}: at most a second copy of the weights, and its cache"
    ranks = sampler.ranks_per_engine
    share = f" (1/{ranks} of them)" if ranks > 1 else ""
    return (
        f"{weights / MIB:10,.0f} MiB weights{share}, and a cache of {sampler.cache_gib:g} GiB "
        f"without a GPU; {sampler.gpu_memory_utilization:.0%} of a GPU in all"
    )
