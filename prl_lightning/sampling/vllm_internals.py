"""vLLM's own types and habits: requests, its model, and what it does to the trainer's process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from prl_lightning.runs.heap import drop_pages
from prl_lightning.sampling.base import SamplingConfig
from prl_lightning.types import Completion, Prompt


def keep_to_itself() -> None:
    """Keep vLLM from changing what the trainer has in the same process.

    Where vLLM has no implementation of an architecture, it uses that of transformers. It would
    compile it by replacing methods of the class, which then fail outside of the engine. When an
    engine ends, vLLM would destroy every process group, including the trainer's, if it has one.

    Without a GPU, builds for AVX-512 would share memory between an engine's ranks, under a name
    that all runs of a machine have. A rank whose neighbour fails would wait in an endless loop, and
    the ranks add in different orders, so they round differently (vLLM's csrc/cpu/shm.cpp). gloo
    raises an error and gives all ranks the same sum.
    """
    from vllm.distributed import parallel_state
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
    from vllm.model_executor.models.transformers import base

    base.Base._decorate_for_torch_compile = lambda self: None
    if distributed.is_initialized():
        parallel_state.destroy_distributed_environment = lambda: None
    CpuCommunicator._all_group_ranks_share_shm_group_name = lambda self: False


def skip_ranks() -> None:
    """Spare vLLM the rank of each sampled token, for which it compiles a kernel and nobody asks."""
    from vllm.v1.sample import sampler

    sampler.batched_count_greater_than = lambda logprobs, _: logprobs.new_zeros(
        len(logprobs), dtype=torch.int64
    )


def is_implemented(config: PretrainedConfig) -> bool:
    """Whether vLLM implements an architecture, or can use transformers' implementation."""
    kind = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if kind is None or kind._supports_attention_backend:  # spares the import of vLLM
        return True
    from vllm import ModelRegistry

    return kind.__name__ in ModelRegistry.get_supported_archs()


def has_head(model: nn.Module) -> bool:
    """Whether the engine's model has an output head; if tied, it may use the embeddings alone."""
    return any(name.rpartition(".")[2] == "lm_head" for name, _ in model.named_modules())


def drop_weights(model: nn.Module) -> None:
    """Free what the next load brings again without a GPU: packed matrices, and embeddings.

    vLLM's CPU build keeps most matrices in a packed copy alone, of a layer's kernel, and packs them
    anew at each load.
    """
    for module in model.modules():
        layer: Any = module
        if part := getattr(layer, "shard_indices", None):  # of the vocabulary
            # A rank's part of a small vocabulary may be padding, for which a load brings nothing.
            # A quantized head has other tensors.
            if part.num_org_elements and hasattr(layer, "weight"):
                layer.cpu_linear = None
                drop_pages(layer.weight.data_ptr(), layer.weight.nbytes)
        elif hasattr(layer, "cpu_linear") and not layer.weight.numel():
            layer.cpu_linear = None


def empty_cache(model: nn.Module) -> None:
    """Free the memory of the key-value cache without a GPU; its blocks are zero until used again.

    Args:
        model: of the engine, whose layers have the cache, or the states of recurrent layers.
    """
    storages = {}
    for module in model.modules():
        cache: Any = getattr(module, "kv_cache", ())
        for tensor in [cache] if isinstance(cache, Tensor) else cache:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    for address, size in storages.items():
        drop_pages(address, size)


def prepare_load(model: nn.Module) -> None:
    """Let the next load pack, without a GPU, what has to be packed and nothing else.

    vLLM's CPU build packs the experts of a mixture when it creates their kernel, and later loads
    would reuse the kernel. It also packs embeddings, which only an output head would need.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import (
        ParallelLMHead,
        VocabParallelEmbedding,
    )

    own_head = has_head(model)
    for module in model.modules():
        layer: Any = module
        if hasattr(getattr(layer, "quant_method", None), "moe_kernel"):
            layer.quant_method.moe_kernel = None
        is_table = isinstance(layer, VocabParallelEmbedding)
        if own_head and is_table and not isinstance(layer, ParallelLMHead):
            layer.cpu_linear = None
            layer.quant_method.process_weights_after_loading = lambda _: None


def sampling_params(prompts: Sequence[Prompt], config: SamplingConfig) -> list[Any]:
    """Return vLLM's settings of each prompt."""
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


def completion_of(sample: Any) -> Completion:
    """Turn vLLM's output into a completion."""
    token_ids = list(sample.token_ids)
    logprobs = [step[token].logprob for step, token in zip(sample.logprobs, token_ids, strict=True)]
    return Completion(token_ids, logprobs, finished=sample.finish_reason == "stop")
