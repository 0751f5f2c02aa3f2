"""LoRA adapters through peft. The policy with its adapter off is the reference."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prl_lightning.models.sharding import full, plain_name

ADAPTER = "default"
# Settings whose adapter cannot be merged into plain weights, which the engine needs.
UNMERGEABLE = ("use_dora", "modules_to_save", "trainable_token_indices", "lora_bias")


def add_lora(causal_lm: PreTrainedModel, settings: dict[str, Any]) -> None:
    """Add a LoRA adapter to a model, in place, and freeze everything else.

    Args:
        causal_lm: the model.
        settings: arguments of ``peft.LoraConfig``, such as ``r`` and ``target_modules``.

    Raises:
        ImportError: peft is not installed.
        ValueError: peft rejects a setting, or the adapter could not be merged into plain weights.
    """
    if importlib.util.find_spec("peft") is None:
        raise ImportError(
            "model.lora needs peft: install it with `pip install 'prl-lightning[lora]'`."
        )
    from peft import LoraConfig, inject_adapter_in_model

    for name in UNMERGEABLE:
        if settings.get(name):
            raise ValueError(
                f"model.lora.{name}={settings[name]!r} cannot be merged into the weights that the "
                "engine samples with. Remove it."
            )
    try:
        config = LoraConfig(task_type="CAUSAL_LM", **settings)
    except TypeError as error:
        raise ValueError(f"model.lora={settings}: {error}. See peft.LoraConfig.") from error
    causal_lm.requires_grad_(False)
    # Every rank gets the same adapter, and the random state of the run does not change.
    with torch.random.fork_rng():
        torch.manual_seed(0)
        inject_adapter_in_model(config, causal_lm, ADAPTER)


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Compute with the base weights inside this context."""
    layers = list(_adapted_layers(model).values())
    # peft's `enable_adapters` would also freeze the adapter, and a strategy that has sharded it
    # would see its parameters change.
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def merged(
    model: nn.Module, named_tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield a model's weights with its adapter merged in, under the names of the base model.

    Args:
        model: with or without an adapter.
        named_tensors: its weights; sharded ones are gathered one at a time.
        dtype: of the matrices, by default unchanged. Vectors keep theirs: they are small, and an
            engine may hold them in higher precision.

    Yields:
        Name and full tensor.
    """
    layers = _adapted_layers(model)
    for name, tensor in named_tensors:
        if ".lora_" in name:
            continue
        layer, _, of_base = name.rpartition(".base_layer.")
        if of_base == "weight":
            delta = layers[layer].get_delta_weight(ADAPTER)
            yield f"{layer}.weight", (full(tensor) + full(delta).to(tensor.dtype)).to(dtype)
        else:
            # Cast before gathering, which halves the traffic.
            sent = tensor.to(dtype) if tensor.ndim > 1 and tensor.is_floating_point() else tensor
            yield name.replace(".base_layer.", "."), full(sent)


def _adapted_layers(model: nn.Module) -> dict[str, Any]:
    """Return the layers that have an adapter, by name."""
    if not any(".lora_" in name for name, _ in model.named_parameters()):
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {
        plain_name(name): layer
        for name, layer in model.named_modules()
        if isinstance(layer, BaseTunerLayer)
    }
