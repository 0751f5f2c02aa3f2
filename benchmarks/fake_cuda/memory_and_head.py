"""Memory of micro-batches, and of the output head by the size of its blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fake_gpu import bf16_mixed, fake_gpu, fake_model, group, say, to_gpu
from memory_mode import Memory, in_gib, shares, size_of
from prl_lightning.functional import token_logprobs
from prl_lightning.models.causal_lm import LogprobModel


@dataclass(frozen=True)
class Work:
    """A group of completions of equal length, with a prompt of 200 tokens."""

    model: str
    completions: int
    tokens: int
    gradient_checkpointing: bool = True
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        kept = "checkpointing" if self.gradient_checkpointing else "no checkpointing"
        weights = str(self.dtype).removeprefix("torch.")
        return f"{self.model}, {self.completions} x {self.tokens}, {kept}, {weights} weights"


SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "tie_word_embeddings",
)
MODELS = {
    "Qwen2.5-0.5B": ("qwen2", 151_936, 896, 4864, 24, 14, 2, 64, True),
    "Qwen2.5-1.5B": ("qwen2", 151_936, 1536, 8960, 28, 12, 2, 128, True),
    "Qwen2.5-7B": ("qwen2", 152_064, 3584, 18_944, 28, 28, 4, 128, False),
    "Qwen3-4B": ("qwen3", 151_936, 2560, 9728, 36, 32, 8, 128, True),
}
WORKS = (
    Work("Qwen2.5-0.5B", 8, 1024),
    Work("Qwen2.5-0.5B", 8, 1024, gradient_checkpointing=False),
    Work("Qwen2.5-1.5B", 10, 3072),
    Work("Qwen2.5-7B", 10, 3072),
    Work("Qwen3-4B", 4, 8192),
    Work("Qwen3-4B", 4, 8192, dtype=torch.bfloat16),
    Work("Qwen3-4B", 8, 8192),
)


def model_of(work: Work) -> LogprobModel:
    architecture, *numbers = MODELS[work.model]
    sizes = dict(zip(SIZES, numbers, strict=True))
    return fake_model(architecture, sizes, work.dtype, work.gradient_checkpointing)


def memory() -> dict[str, Any]:
    """What a micro-batch takes beyond the weights, under bf16-mixed."""
    results = {}
    for work in WORKS:
        real = group(work.completions, work.tokens)
        with fake_gpu() as mode:
            model, batch = model_of(work), to_gpu(mode, real)
            with Memory() as used:
                with bf16_mixed():
                    loss = model(batch)[0].sum()
                kept, forward_peak = used.now, used.peak
                loss.backward()
        gradients = sum(size_of([x.grad]) for x in model.parameters() if x.grad is not None)
        results[str(work)] = {
            "packed_tokens": real.packing.input_ids.numel(),
            "kept_for_backward_gib": in_gib(kept),
            "forward_peak_gib": in_gib(forward_peak),
            "peak_gib": in_gib(used.peak),
            "gradients_gib": in_gib(gradients),
            "traffic_tb": round(used.traffic.total() / 1e12, 3),
            "traffic_shares": shares(used),
        }
        say(str(work), results[str(work)])
    return results


def head(
    tokens: int = 12_288, hidden_size: int = 2560, vocabulary: int = 151_936
) -> dict[str, Any]:
    """The output head of a 4B model under bf16-mixed, forward and backward."""
    results = {}
    for max_logits in (None, 2**24, 2**26, 2**28):
        with fake_gpu(), torch.device("cuda"):
            hidden = torch.empty(tokens, hidden_size, requires_grad=True)
            weight = torch.empty(vocabulary, hidden_size, requires_grad=True)
            targets = torch.empty(tokens, dtype=torch.long)
            with Memory() as used:
                with bf16_mixed():
                    logprobs, _ = token_logprobs(hidden, weight, targets, max_logits=max_logits)
                forward = used.traffic.total()
                logprobs.sum().backward()
        name = "automatic" if max_logits is None else f"2^{max_logits.bit_length() - 1} logits"
        results[name] = {
            "traffic_mb_a_token": round(used.traffic.total() / tokens / 1e6, 2),
            "of_it_forward": round(forward / tokens / 1e6, 2),
            "peak_gib": in_gib(used.peak),
            "traffic_shares": shares(used),
        }
        say(f"blocks: {name}", results[name])
    return results
