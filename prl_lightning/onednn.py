"""Linear layers in float32 on a CPU by oneDNN, where torch takes MKL.

On AMD's processors oneDNN is the faster one for the products of a forward pass and of the gradient
of its input (``benchmarks/bench_update.py`` has what that leaves of an update). The product for the
gradient of the weight stays with MKL, which is faster there.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def use_onednn(model: nn.Module) -> None:
    """Let the linear layers of a model compute by oneDNN, if torch has it, wherever it applies.

    Where is decided at each call, because a strategy moves a model after it is made.
    """
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return
    for layer in model.modules():
        if type(layer) is nn.Linear:
            layer.forward = partial(_forward, layer)  # type: ignore[method-assign]


def _forward(layer: nn.Linear, rows: Tensor) -> Tensor:
    applies = (
        rows.device.type == "cpu"
        and rows.dtype == layer.weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
    )
    if not applies:
        return nn.Linear.forward(layer, rows)
    product: Tensor = _Linear.apply(rows, layer.weight, layer.bias)  # type: ignore[no-untyped-call]
    return product


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return rows @ weight.T + bias, by the operator that torch's own compiler emits for it."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return product


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return _product(rows, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        rows, weight = ctx.saved_tensors
        needs_rows, needs_weight, needs_bias = ctx.needs_input_grad
        flat = grad.reshape(-1, grad.shape[-1])
        return (
            _product(grad, weight.T) if needs_rows else None,
            flat.T @ rows.reshape(-1, rows.shape[-1]) if needs_weight else None,
            flat.sum(0) if needs_bias else None,
        )
