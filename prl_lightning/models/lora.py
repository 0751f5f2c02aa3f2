"""LoRA adapters through peft. The policy with its adapter off is the reference."""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, Field, fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prl_lightning.models.sharding import full, plain_name

ADAPTER = "default"
TASK = {"task_type": "CAUSAL_LM"}
# Settings of a plain adapter. Any other may change the base, drop activations in the trainer alone,
# or make weights that cannot be merged into those of the base, which the engine needs.
PLAIN = {
    "r", "lora_alpha", "use_rslora", "fan_in_fan_out", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
}  # fmt: skip


def add_lora(causal_lm: PreTrainedModel, settings: dict[str, Any]) -> None:
    """Add a LoRA adapter to a model, in place, and freeze everything else.

    Args:
        causal_lm: the model.
        settings: arguments of ``peft.LoraConfig``, such as ``r`` and ``target_modules``.

    Raises:
        ImportError: peft is not installed.
        ValueError: peft rejects a setting, or trainer, engine and reference would differ.
    """
    if importlib.util.find_spec("peft") is None:
        raise ImportError(
            "model.lora needs peft: install it with `pip install 'prl-lightning[lora]'`."
        )
    from peft import LoraConfig, inject_adapter_in_model

    _refuse_settings(settings, fields(LoraConfig))
    try:
        config = LoraConfig(**settings | TASK)
        # Every rank gets the same adapter, and the random state of the run does not change.
        with torch.random.fork_rng():
            torch.manual_seed(0)
            causal_lm.requires_grad_(False)
            inject_adapter_in_model(config, causal_lm, ADAPTER)
    except (TypeError, ValueError) as error:
        text = str(error).rstrip(".")
        raise ValueError(f"model.lora={settings}: {text}. See peft.LoraConfig.") from error
    _refuse_places(causal_lm)


def _refuse_settings(settings: dict[str, Any], known: Iterable[Field[Any]]) -> None:
    """Raise a ValueError at settings with which the adapter would not be a plain one."""
    defaults = {
        field.name: field.default if field.default_factory is MISSING else field.default_factory()
        for field in known
    }
    defaults |= TASK
    for name, value in settings.items():
        # Only these two start as zero, which makes the base the initial policy.
        starts_as_zero = name == "init_lora_weights" and (value is True or value == "gaussian")
        is_plain = name in PLAIN or starts_as_zero
        if name in defaults and not is_plain and value != defaults[name]:
            raise ValueError(
                f"model.lora.{name}={value!r}: trainer, engine, reference and export have the same "
                f"weights only with {', '.join(sorted(PLAIN))} and init_lora_weights true or "
                "'gaussian'. Remove it."
            )


def _refuse_places(causal_lm: PreTrainedModel) -> None:
    """Raise a ValueError at an adapter that would not be computed, or not be sent."""
    from peft.tuners import lora

    head, decoder = causal_lm.get_output_embeddings(), set(causal_lm.get_decoder().modules())
    names = defaultdict(list)
    for name, parameter in causal_lm.named_parameters(remove_duplicate=False):
        names[parameter].append(name.replace(".base_layer", ""))
    for name, layer in _adapted_layers(causal_lm).items():
        reason = None
        if layer is head or layer not in decoder:
            reason = "is not part of the decoder, whose hidden states alone are computed"
        elif type(layer) not in (lora.Linear, lora.Embedding):
            reason = "has experts or other parameters that are no linear layer or embedding"
        elif len(tied := names[layer.base_layer.weight]) > 1:
            reason = f"shares its weight ({', '.join(tied)})"
        elif layer.scaling[ADAPTER] == 0:
            reason = "is multiplied by lora_alpha=0"
        if reason:
            raise ValueError(
                f"model.lora puts an adapter on {name}, which {reason}. Name other modules in "
                "target_modules, such as [q_proj, v_proj]."
            )


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
