"""An estimate of the memory of a rank, from shapes and tensors without memory."""

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

from prl_lightning.data import PromptDataModule, collate
from prl_lightning.functional.logprobs import _BLOCK_LOGITS
from prl_lightning.models.causal_lm import LogprobModel
from prl_lightning.models.loading import causal_lm_from_config, load_config
from prl_lightning.models.sharding import is_offloading, is_sharding
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


def describe_memory(
    trainer: Trainer,
    module: PRLModule,
    data: PromptDataModule,
    rollout: RolloutSettings,
    on_gpu: bool,
) -> list[str]:
    """Describe the memory of a rank, line by line.

    Args:
        trainer: number of ranks, precision, strategy.
        module: need not be loaded.
        data: need not be read.
        rollout: settings of the sampling; its sampler has its dtype.
        on_gpu: whether the run has GPUs.
    """
    parts = dict(_memory(trainer, module, bool(data.train_sources)))
    sampler = rollout.engine_sampler
    size = 4 if sampler.dtype == "float32" else 2
    engine = _parameters(module.policy_name) * size / sampler.ranks_per_engine
    queued = rollout.max_staleness * engine if rollout.max_staleness > 1 else 0.0
    offloaded = sum(parts.values()) if is_offloading(trainer.strategy) else 0.0
    on_device = {} if on_gpu and offloaded else parts
    beside = engine if on_gpu else engine + queued
    return [
        "memory of a rank (an estimate):",
        *(f"  {name:<16} {size / MIB:10,.0f} MiB" for name, size in parts.items()),
        f"  {'engine':<16} {_engine(sampler, engine)}",
        *_in_main_memory(queued, offloaded),
        *_beside_weights(trainer, module, data, rollout, on_device, beside, on_gpu),
    ]


def _in_main_memory(queued: float, offloaded: float) -> Iterator[str]:
    """Describe what is there also with a GPU."""
    if queued:
        yield (
            f"  {'queued weights':<16} {queued / MIB:10,.0f} MiB of main memory at most, a copy "
            "for each iteration of rollout.max_staleness"
        )
    if offloaded:
        yield (
            f"  {'offloaded':<16} {offloaded / MIB:10,.0f} MiB of main memory: all of the above "
            "but the engine. With a GPU, gathered blocks are not in the sums below"
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
    weights: dict[str, float],
    engine: float,
    on_gpu: bool,
) -> Iterator[str]:
    """Describe a micro-batch's memory, and what ``_sums`` does."""
    total = sum(weights.values())
    if data.train_sources:
        sizes = data.sizes(trainer)
        rows = sizes.prompts * sizes.group_size // sizes.updates // sizes.ranks
        row = data.max_prompt_tokens + rollout.max_new_tokens
        evenly = rows // sizes.micro_batches * row
        tokens = min(rows * row, max(data.micro_batch_tokens or 0, evenly))
        per_token = _activations(module, str(trainer.precision))
        vocabulary = load_config(module.policy_name).get_text_config().vocab_size
        block = _BLOCK_LOGITS["cuda" if on_gpu else "cpu"]
        logits = 2 * 4 * min(tokens * vocabulary, block)  # two buffers in float32
        total += tokens * (per_token or 0) + logits
        yield f"  {'activations':<16} " + (
            "unknown for this architecture, and not in the sum"
            if per_token is None
            else f"{tokens * per_token / MIB:10,.0f} MiB at most: {per_token / 1024:,.0f} KiB a "
            f"token, {tokens:,} tokens in a micro-batch at the limits"
        )
        yield f"  {'logits':<16} {logits / MIB:10,.0f} MiB at most, in blocks"
    yield from _sums(rollout, weights, total, engine, on_gpu)


def _sums(
    rollout: RolloutSettings,
    weights: dict[str, float],
    updating: float,
    engine: float,
    on_gpu: bool,
) -> Iterator[str]:
    """Describe the code's memory without a GPU, and the sums.

    Args:
        rollout: settings of the sampling.
        weights: bytes of weights and states by purpose.
        updating: bytes of these and of a micro-batch.
        engine: bytes of its weights, and of those that wait for it.
        on_gpu: whether the run has GPUs.
    """
    sampler = rollout.engine_sampler
    # The gradient is freed before sampling.
    sampling = sum(weights.values()) - weights.get("gradient", 0) + engine
    if on_gpu:
        updating += 0 if getattr(sampler, "sleeps", False) else engine
        yield f"  {'in the update':<16} {updating / MIB:10,.0f} MiB at most, and CUDA's own"
        yield f"  {'in the sampling':<16} {sampling / MIB:10,.0f} MiB and the cache"
        return
    code, cache = CODE_BYTES, 0.0
    if isinstance(sampler, VLLMSampler):
        code, cache = 2 * code, sampler.cache_gib * 2**30
    # In the trainer's process, vLLM frees its weights and its cache before the update.
    is_freed = isinstance(rollout.sampler, VLLMSampler)
    most = max(updating, sampling + cache) if is_freed else updating + engine + cache
    yield f"  {'code':<16} {code / MIB:10,.0f} MiB of Python, torch and the engine"
    yield f"  {'in all':<16} {(code + most) / MIB:10,.0f} MiB at most, without a GPU"


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


def _engine(sampler: Sampler, weights: float) -> str:
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
