"""Tiny random models of the architectures that people have."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from random_models import EXPERTS, random_model

# vLLM's attention on a CPU supports no heads smaller than 32.
SIZES: dict[str, Any] = {
    "hidden_size": 128, "max_position_embeddings": 512,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
WINDOW: dict[str, Any] = {"sliding_window": 8}
LAYERS: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention"]}
LINEAR: dict[str, Any] = {"layer_types": ["linear_attention", "full_attention"]}
ROUTED: dict[str, Any] = {"num_experts_per_tok": 2}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 512, "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32, "v_head_dim": 32, "head_dim": 64, "n_routed_experts": 8,
    "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "moe_intermediate_size": 32,
    "topk_method": "noaux_tc", "scoring_func": "sigmoid",
}  # fmt: skip
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "qwen3_moe": ("qwen3_moe", {}),
    "qwen3_next": ("qwen3_next", EXPERTS | LINEAR),
    "llama": ("llama", {}),
    "llama, scaled rope": ("llama", {"rope_parameters": LLAMA3}),
    "mistral, window": ("mistral", WINDOW),
    "mixtral": ("mixtral", {}),
    "gemma2": ("gemma2", WINDOW | LAYERS),
    "gemma3_text": ("gemma3_text", WINDOW | LAYERS),
    "phi3": ("phi3", {}),
    "granite": ("granite", {"logits_scaling": 8.0, "residual_multiplier": 0.22}),
    "cohere": ("cohere", {}),
    "cohere2": ("cohere2", WINDOW | LAYERS),
    "olmo2": ("olmo2", {}),
    "olmoe": ("olmoe", ROUTED | {"num_experts": 8}),
    "smollm3": ("smollm3", {}),
    "glm4": ("glm4", {}),
    "gpt_oss": ("gpt_oss", WINDOW | LAYERS | ROUTED | {"num_local_experts": 8}),
    "deepseek_v3": ("deepseek_v3", LATENT | ROUTED),
}
# These mix tokens outside of attention.
PADDED = {"qwen3_next"}
# vLLM does not run these on a CPU.
REFUSED = ("qwen3_next", "gpt_oss", "deepseek_v3")


def tiny(name: str, **more: Any) -> PreTrainedModel:
    kind, sizes = ARCHITECTURES[name]
    return random_model(kind, **SIZES | sizes | more)
