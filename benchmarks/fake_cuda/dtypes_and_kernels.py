"""The dtype a GPU would compute each product in, and the attention kernel it would take."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fake_gpu import bf16_mixed, fake_gpu, fake_model, group, say, to_gpu
from observer import Observer
from prl_lightning.models.packed_attention import disable_cudnn_attention

SIZES = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "_grouped_mm"}
ATTENTION = "scaled_dot_product"
ROWS: dict[str, tuple[str, dict[str, Any], Callable[[], AbstractContextManager[Any]]]] = {
    "bf16-mixed": ("qwen3", {}, bf16_mixed),
    "bf16-mixed, sliding window": ("mistral", {"sliding_window": 256}, bf16_mixed),
    "float32, grouped heads": ("qwen3", {}, nullcontext),
    "float32, a key head for each head": ("qwen3", {"num_key_value_heads": 4}, nullcontext),
}


class Products(Observer):
    """Count matrix products and attention by the dtypes of what they multiply.

    Attributes:
        counts: by operation, then by dtype.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, Counter[str]] = defaultdict(Counter)

    def see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        name = func.overloadpacket.__name__
        if name in PRODUCTS or ATTENTION in name:
            factors = [x for x in args[:3] if isinstance(x, Tensor) and x.is_floating_point()]
            dtypes = {str(factor.dtype).removeprefix("torch.") for factor in factors}
            self.counts[name][" and ".join(sorted(dtypes))] += 1


def dtypes() -> dict[str, Any]:
    """Products of a micro-batch under bf16-mixed; a mixture's also as transformers has them."""
    results = {}
    for name, sizes, experts in (
        ("qwen3", {}, None),
        ("qwen3_moe", EXPERTS, None),
        ("qwen3_moe, transformers' experts", EXPERTS, "grouped_mm"),
    ):
        real = group(completions=4, tokens=64)
        with fake_gpu() as mode:
            model = fake_model(name.split(",")[0], SIZES | sizes)
            if experts:
                model.causal_lm.set_experts_implementation(experts)
            batch = to_gpu(mode, real)
            with Products() as forward, bf16_mixed():
                loss = model(batch)[0].sum()
            with Products() as backward:
                loss.backward()
        results[name] = {"forward": forward.counts, "backward": backward.counts}
        say(name, results[name])
    return results


def kernels() -> dict[str, dict[str, list[str]]]:
    """Attention of packed rows in a forward pass, by torch's own choice and without cuDNN.

    Without a kernel of its own it is plain products, which write all scores to memory.
    """
    results: dict[str, dict[str, list[str]]] = {}
    for name, (architecture, sizes, precision) in ROWS.items():
        real = group(completions=4, tokens=1024)
        results[name] = {}
        with fake_gpu() as mode:
            model = fake_model(architecture, SIZES | sizes)
            batch = to_gpu(mode, real)
            torch.backends.cuda.enable_cudnn_sdp(True)  # as before any model was made
            for allowed in ("all kernels", "without cuDNN"):
                with Products() as products, precision():
                    model(batch)
                found = [op for op in products.counts if ATTENTION in op]
                results[name][allowed] = found or ["bmm"]
                disable_cudnn_attention()
        say(name, results[name])
    return results
