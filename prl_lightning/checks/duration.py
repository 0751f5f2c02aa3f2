"""An estimate of the seconds of an iteration, from its sizes and the speed of the hardware."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.pytorch import Trainer

from prl_lightning.checks.contradictions import ConfigurationError
from prl_lightning.data import PromptDataModule
from prl_lightning.models.loading import causal_lm_from_config
from prl_lightning.module import PRLModule
from prl_lightning.rollouts.settings import RolloutSettings

# Peak FLOP/s of dense bfloat16 and of float32, and bytes/s of memory, by NVIDIA's data sheets.
GPUS = {
    "B200": (2250e12, 80e12, 8.0e12),
    "H200": (989e12, 67e12, 4.8e12),
    "H100": (989e12, 67e12, 3.35e12),
    "H20": (148e12, 44e12, 4.0e12),
    "A100": (312e12, 19.5e12, 2.0e12),
    "L40S": (362e12, 91.6e12, 0.864e12),
    "L4": (121e12, 30.3e12, 0.3e12),
    "A10": (125e12, 31.2e12, 0.6e12),
    "RTX5090": (209e12, 104.8e12, 1.79e12),
    "RTX4090": (165e12, 82.6e12, 1.01e12),
    "RTX3090": (71e12, 35.6e12, 0.936e12),
}
# Shares of the peaks that are reached: on a CPU by benchmarks/bench_duration.py, on a GPU assumed.
UPDATE_SHARE = {"cuda": 0.40, "cpu": 0.60}
SAMPLING_SHARE = {"cuda": 0.50, "cpu": 0.36}
# What vLLM's Python costs for a step, and for each running completion in it (same benchmark).
STEP_SECONDS = 0.006
ROW_SECONDS = 65e-6
MAX_ROWS = 256  # that vLLM runs at a time by default


@dataclass(frozen=True)
class Hardware:
    """The speed of a device.

    Attributes:
        name: for people.
        kind: "cuda" or "cpu".
        half_flops: FLOP/s of matrix products in bfloat16.
        flops: FLOP/s of matrix products in float32.
        bandwidth: bytes/s of its memory.
    """

    name: str
    kind: str
    half_flops: float
    flops: float
    bandwidth: float


@dataclass(frozen=True)
class ModelCosts:
    """What a token costs a model.

    Attributes:
        body: weights that a token is multiplied with, without the output head.
        head: weights of the output head.
        read: weights that a decoding step of many completions reads; with experts more than `body`.
        attention: FLOP of a token's attention for each token that it attends to.
        cached: numbers that the key-value cache has for a token.
    """

    body: float
    head: float
    read: float
    attention: float
    cached: float


@dataclass(frozen=True)
class Work:
    """An iteration of one rank.

    Attributes:
        prompts: number of prompts.
        group_size: completions of a prompt.
        prompt_tokens: of a prompt.
        completion_tokens: of a completion.
    """

    prompts: int
    group_size: int
    prompt_tokens: float
    completion_tokens: float

    @property
    def rows(self) -> int:
        """Number of completions."""
        return self.prompts * self.group_size


def hardware(name: str | None = None) -> Hardware:
    """Return the speed of a GPU, or measure that of this machine.

    Args:
        name: such as "H100"; by default this machine's GPU, or its CPU if it has none.

    Raises:
        ConfigurationError: the GPU is not in the table.
    """
    if name is None and not torch.cuda.is_available():
        flops, bandwidth = _measured()
        return Hardware("this CPU", "cpu", flops, flops, bandwidth)
    asked = name or torch.cuda.get_device_name()
    plain = asked.upper().replace(" ", "").replace("-", "")
    known = [key for key in GPUS if key in plain]
    if not known:
        raise ConfigurationError(
            f"--gpu={asked}: its speed is not known. Use one of {', '.join(GPUS)}."
        )
    key = max(known, key=len)
    return Hardware(key, "cuda", *GPUS[key])


def costs_of(policy: str) -> ModelCosts:
    """Count a model's weights without loading them.

    Args:
        policy: Hugging Face id or folder.
    """
    with torch.device("meta"):
        skeleton = causal_lm_from_config(policy)
    config: Any = skeleton.config.get_text_config()
    embeddings = skeleton.get_input_embeddings().weight
    weights = {name: weight.numel() for name, weight in skeleton.named_parameters()}
    body = sum(weights.values()) - embeddings.numel()
    if skeleton.get_output_embeddings().weight is not embeddings:
        body -= embeddings.numel()
    experts = sum(size for name, size in weights.items() if ".experts." in name)
    used = getattr(config, "num_experts_per_tok", None) or 1
    of = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None) or used
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    key_values = getattr(config, "num_key_value_heads", None) or heads
    return ModelCosts(
        body=body - experts * (1 - used / of),
        head=embeddings.numel(),
        read=body + embeddings.numel(),
        attention=4.0 * config.num_hidden_layers * heads * width,
        cached=2.0 * config.num_hidden_layers * key_values * width,
    )


def sampling_seconds(work: Work, costs: ModelCosts, device: Hardware, is_half: bool) -> float:
    """Estimate the time of sampling: prefill of the prompts, then a step for each token.

    Args:
        work: of this rank's engine.
        costs: of the policy.
        device: of the rank.
        is_half: whether the engine computes in 16 bits.
    """
    flops = (device.half_flops if is_half else device.flops) * SAMPLING_SHARE[device.kind]
    bandwidth = device.bandwidth * SAMPLING_SHARE[device.kind]
    size = 2 if is_half else 4
    prefill = work.prompts * work.prompt_tokens * 2 * costs.body / flops
    steps = math.ceil(work.rows / MAX_ROWS) * work.completion_tokens
    rows = work.rows * work.completion_tokens / steps if steps else 0.0
    context = work.prompt_tokens + work.completion_tokens / 2
    computing = rows * (2 * (costs.body + costs.head) + costs.attention * context) / flops
    reading = size * (costs.read + rows * context * costs.cached) / bandwidth
    host = STEP_SECONDS + ROW_SECONDS * rows
    return prefill + steps * (max(computing, reading) + host)


def update_seconds(
    work: Work, costs: ModelCosts, device: Hardware, is_half: bool, passes: float
) -> float:
    """Estimate the time of an iteration's updates with their scoring.

    Args:
        work: of this rank; a group's completions share the computation of their prompt.
        costs: of the policy.
        device: of the rank.
        is_half: whether the trainer computes in 16 bits.
        passes: in units of a forward pass; forward and backward are 3.
    """
    flops = (device.half_flops if is_half else device.flops) * UPDATE_SHARE[device.kind]
    completions = work.rows * work.completion_tokens
    tokens = work.prompts * work.prompt_tokens + completions
    context = work.prompt_tokens + work.completion_tokens / 2
    forward = 2 * costs.body * tokens + completions * (2 * costs.head + costs.attention * context)
    return passes * forward / flops


def describe_duration(
    trainer: Trainer,
    module: PRLModule,
    data: PromptDataModule,
    rollout: RolloutSettings,
    gpu: str | None,
) -> list[str]:
    """Describe the seconds of an iteration at the limits of length, without its evaluation.

    Args:
        trainer: ranks and precision.
        module: need not be loaded.
        data: need not be read.
        rollout: settings of the sampling.
        gpu: see `hardware`.

    Raises:
        ConfigurationError: the GPU is not known.
    """
    device = hardware(gpu)
    sizes = data.sizes(trainer)
    work = Work(
        sizes.prompts // sizes.ranks,
        sizes.group_size,
        data.max_prompt_tokens,
        rollout.max_new_tokens,
    )
    costs = costs_of(module.policy_name)
    sampler = rollout.engine_sampler
    is_half = str(trainer.precision).startswith(("bf16", "16"))
    shared = sampler.ranks_per_engine  # one engine has the work and the speed of so many ranks
    of_engine = replace(work, prompts=work.prompts * shared)
    engine = replace(
        device,
        half_flops=device.half_flops * shared,
        flops=device.flops * shared,
        bandwidth=device.bandwidth * shared,
    )
    parts = {
        "sampling": sampling_seconds(of_engine, costs, engine, sampler.dtype != "float32"),
        "update": update_seconds(work, costs, device, is_half, _passes(module, sizes.updates)),
    }
    lines = [
        f"time of an iteration on {sizes.ranks} x {device.name} (an estimate, if every prompt and "
        "completion has its limit of tokens, without rewards and evaluation):"
    ]
    lines += [f"  {name:<16} {seconds:10,.1f} s" for name, seconds in parts.items()]
    epochs = trainer.max_epochs or 0
    if epochs > 0:
        hours = sum(parts.values()) * epochs / 3600
        lines.append(f"  {'the run':<16} {hours:10,.1f} h for {epochs} iterations")
    return lines


def _passes(module: PRLModule, updates: int) -> int:
    """Return the work on a token in units of a forward pass."""
    update = 3 if module.lora is None else 2  # frozen weights have no gradient
    scores_policy = updates > 1 or module.objective.needs_log_ratios
    return update + module.gradient_checkpointing + len(module.references.sources()) + scores_policy


def _measured() -> tuple[float, float]:
    """Return FLOP/s of a matrix product and bytes/s of a copy, the best of some tries."""
    size = 1024
    matrix, big = torch.randn(size, size), torch.zeros(2**24)
    product = min(_seconds(lambda: matrix @ matrix) for _ in range(8))
    copy = min(_seconds(lambda: big.clone()) for _ in range(4))
    return 2 * size**3 / product, 2 * big.nbytes / copy


def _seconds(work: Any) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
