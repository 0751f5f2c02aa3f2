"""LoRA through peft: a policy whose reference is itself with the adapter off."""

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
# What the engine could not be given as plain weights.
UNMERGEABLE = ("use_dora", "modules_to_save", "trainable_token_indices", "lora_bias")


def add_lora(causal_lm: PreTrainedModel, settings: dict[str, Any]) -> None:
    """Put a LoRA adapter into a model, in place, and freeze everything else.

    Args:
        causal_lm: the model.
        settings: arguments of ``peft.LoraConfig``, such as ``r`` and ``target_modules``.

    Raises:
        ImportError: peft is not installed.
        ValueError: a setting that peft does not know, or that cannot be merged into plain weights.
    """
    if importlib.util.find_spec("peft") is None:
        raise ImportError(
            "model.lora needs peft: install it with `pip install 'prl-lightning[lora]'`."
        )
    from peft import LoraConfig, inject_adapter_in_model

    for name in UNMERGEABLE:
        if settings.get(name):
            raise ValueError(
                f"model.lora.{name}={settings[name]!r}: cannot be merged into the weights that the "
                "engine samples with. Leave it out."
            )
    try:
        config = LoraConfig(task_type="CAUSAL_LM", **settings)
    except TypeError as error:
        raise ValueError(f"model.lora={settings}: {error}. See peft.LoraConfig.") from error
    causal_lm.requires_grad_(False)
    # The same start on every rank, and the random numbers of the run left alone.
    with torch.random.fork_rng():
        torch.manual_seed(0)
        inject_adapter_in_model(config, causal_lm, ADAPTER)


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Compute with the weights underneath."""
    layers = list(_adapted_layers(model).values())
    # Not by peft's `enable_adapters`, which also freezes the adapter: a strategy that has sharded
    # it would see another parameter.
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def merged(
    model: nn.Module,
    named_tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Weights as the model had them before it got its adapter, the adapter added in.

    Args:
        model: with an adapter or without.
        named_tensors: its weights; sharded ones are gathered, one at a time.
        dtype: of the matrices, by default their own. Vectors keep theirs: they cost nothing, and
            an engine may have them more precisely.

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
            # Cast before it is gathered: half the traffic.
            sent = tensor.to(dtype) if tensor.ndim > 1 and tensor.is_floating_point() else tensor
            yield name.replace(".base_layer.", "."), full(sent)


def _adapted_layers(model: nn.Module) -> dict[str, Any]:
    """Layers with an adapter, by name."""
    if not any(".lora_" in name for name, _ in model.named_parameters()):
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {
        plain_name(name): layer
        for name, layer in model.named_modules()
        if isinstance(layer, BaseTunerLayer)
    }
