"""Log-probabilities and entropy from hidden states, without a (tokens, vocabulary) tensor.

At a vocabulary of 152 thousand, the float32 logits of a micro-batch of 16 thousand tokens take
10 GB, and autograd keeps several such tensors. Here they exist for one chunk of tokens at a time,
and the backward pass recomputes them.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from prl_lightning.functional.precision import has_bf16_instructions

_CHUNK_ELEMENTS = {"cpu": 2**26, "cuda": 2**28}
"""Logits in an automatic chunk: 256 MiB in float32 on a CPU, which is 441 tokens at a vocabulary of
152 thousand, and 1 GiB on a GPU.

These are enough rows for a matrix product at full speed, and small compared with the weight of the
head. Each chunk reads and writes the gradient of that weight once. On a GPU this dominates, so its
chunks are larger.
"""


def token_logprobs(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    scale: float = 1.0,
    cap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return log π(target | hidden) and the entropy of π = softmax(logits / temperature).

    log π(a) = z_a - log Σ_v exp z_v and entropy = log Σ_v exp z_v - Σ_v π_v z_v. The logits are
    scale·hidden·Wᵀ, or with a cap c (softcapping) c·tanh(scale·hidden·Wᵀ/c), and z = logits/τ.
    Forward and backward hold the logits of one chunk at a time, in at most two buffers.

    The matrix product runs in the dtype of `hidden`, or of autocast if it is on. Softmax, sums and
    the weight's gradient over the chunks are in float32, or float64 if `hidden` is. On a CPU
    without bfloat16 instructions the product that forms that gradient is in float32, too.

    Args:
        hidden: last hidden states, (N, H).
        head_weight: the output embedding, (V, H).
        targets: token ids in [0, V), (N,).
        temperature: of sampling, above 0.
        chunk_size: tokens in a chunk; None derives it from vocabulary and device.
        scale: multiplies the logits.
        cap: tanh keeps every logit between its negative and it; None for no cap.

    Returns:
        Log-probabilities (N,), differentiable in hidden and head_weight, and entropies (N,) in
        nats, not differentiable. Both float32, or float64 if `hidden` is.

    Raises:
        ValueError: shapes disagree, or temperature, chunk_size or cap is out of range.

    Example:
        >>> hidden, weight = torch.zeros(2, 3), torch.ones(4, 3)
        >>> token_logprobs(hidden, weight, torch.tensor([0, 3]))
        (tensor([-1.3863, -1.3863]), tensor([1.3863, 1.3863]))
    """
    _check(hidden, head_weight, targets)
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be above 0.")
    if cap is not None and not cap > 0:
        raise ValueError(f"cap={cap}: must be above 0, or None for no cap.")
    if chunk_size is None:
        elements = _CHUNK_ELEMENTS.get(hidden.device.type, _CHUNK_ELEMENTS["cpu"])
        chunk_size = max(1, elements // max(1, len(head_weight)))
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size}: use at least 1, or None for automatic.")
    logprobs, entropy = _TokenLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden, head_weight, targets, _Transform(scale, cap, temperature), chunk_size
    )
    return logprobs, entropy


class _Transform(NamedTuple):
    """From hidden·Wᵀ to logits over the temperature, in place; and its derivative."""

    scale: float
    cap: float | None
    temperature: float

    def apply_(self, products: Tensor) -> Tensor:
        factor = self.slope
        if self.cap is not None:
            products.mul_(self.scale / self.cap).tanh_()
            factor = self.cap / self.temperature
        return products if factor == 1.0 else products.mul_(factor)

    @property
    def slope(self) -> float:
        """Derivative at 0."""
        return self.scale / self.temperature

    def bend_(self, grads: Tensor, logits: Tensor) -> Tensor:
        """Multiply by the derivative over that at 0, in place of these results of ``apply_``."""
        if self.cap is None:
            return grads
        # Of c·tanh(x/c): 1 - tanh².
        return grads.mul_(logits.mul_(self.temperature / self.cap).square_().neg_().add_(1.0))


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head_weight: Tensor,
        targets: Tensor,
        transform: _Transform,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor]:
        product_dtype = _product_dtype(hidden)
        weight = head_weight.to(product_dtype)
        sum_dtype = torch.promote_types(hidden.dtype, torch.float32)
        logprobs, entropy, log_normalizer = (
            hidden.new_empty(len(hidden), dtype=sum_dtype) for _ in range(3)
        )
        for rows in _chunks(len(hidden), chunk_size):
            logits = _logits(hidden[rows], weight, transform, sum_dtype)
            picked = logits.gather(1, targets[rows, None]).squeeze(1)
            peak = logits.amax(1)
            # Relative to the maximum, so that exp does not overflow.
            probabilities = logits.sub_(peak[:, None]).exp()
            total = probabilities.sum(1)
            log_total = total.log()
            torch.sub(log_total, probabilities.mul_(logits).sum(1).div_(total), out=entropy[rows])
            torch.add(peak, log_total, out=log_normalizer[rows])
            torch.sub(picked, log_normalizer[rows], out=logprobs[rows])
            del logits, probabilities  # free the memory before the next chunk
        ctx.save_for_backward(hidden, head_weight, targets, log_normalizer)
        ctx.transform, ctx.chunk_size, ctx.product_dtype = transform, chunk_size, product_dtype
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        hidden, head_weight, targets, log_normalizer = ctx.saved_tensors
        weight = head_weight.to(ctx.product_dtype)
        sum_dtype = log_normalizer.dtype
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight: Tensor | None = None
        for rows in _chunks(len(hidden), ctx.chunk_size):
            logits = _logits(hidden[rows], weight, ctx.transform, sum_dtype)
            # ∂ log π(a)/∂z = onehot(a) - π, in place of the logits unless a cap needs them again.
            grads = logits if ctx.transform.cap is None else logits.clone()
            grads.sub_(log_normalizer[rows, None]).exp_()
            slope = grad_logprobs[rows, None].to(sum_dtype) * ctx.transform.slope
            grads.mul_(-slope).scatter_add_(1, targets[rows, None], slope)
            grads = ctx.transform.bend_(grads, logits)
            del logits
            grads = grads.to(_dtype_of_weight_product(weight, sum_dtype))
            if grad_hidden is not None:
                grad_hidden[rows] = grads.to(weight.dtype) @ weight
            if ctx.needs_input_grad[1]:
                grad_weight = _plus_product(
                    grad_weight, grads.T, hidden[rows].to(grads.dtype), sum_dtype
                )
            del grads  # free the memory before the next chunk
        if ctx.needs_input_grad[1] and grad_weight is None:  # no tokens
            grad_weight = torch.zeros_like(head_weight)
        if grad_weight is not None:
            grad_weight = grad_weight.to(head_weight.dtype)
        return grad_hidden, grad_weight, None, None, None


def _logits(hidden: Tensor, weight: Tensor, transform: _Transform, dtype: torch.dtype) -> Tensor:
    return transform.apply_((hidden.to(weight.dtype) @ weight.T).to(dtype))


def _dtype_of_weight_product(weight: Tensor, sum_dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the product that forms the weight's gradient.

    Rounding it to bfloat16 hardly adds to the error of the gradient, which is that of the logits
    (benchmarks/bench_weight_gradient.py). Without bfloat16 instructions float32 is faster as well.
    """
    return sum_dtype if weight.is_cpu and not has_bf16_instructions() else weight.dtype


def _plus_product(
    total: Tensor | None, left: Tensor, right: Tensor, sum_dtype: torch.dtype
) -> Tensor:
    """Add left·right in place. None is a total of zeros, which the head's size makes costly."""
    if total is None:
        return (left @ right).to(sum_dtype)
    if left.dtype == total.dtype:
        return total.addmm_(left, right)
    # The product stays in low precision, which is fast; only the sum over chunks needs more.
    return total.add_(left @ right)


def _chunks(count: int, chunk_size: int) -> Iterator[slice]:
    for start in range(0, count, chunk_size):
        yield slice(start, start + chunk_size)


def _product_dtype(hidden: Tensor) -> torch.dtype:
    # Autocast does not change float64, as in torch's own layers.
    device = hidden.device.type
    if hidden.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return hidden.dtype


def _check(hidden: Tensor, head_weight: Tensor, targets: Tensor) -> None:
    fits = hidden.ndim == head_weight.ndim == 2 and hidden.shape[1] == head_weight.shape[1]
    if not fits or targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)}, head_weight {tuple(head_weight.shape)} and "
            f"targets {tuple(targets.shape)}: pass (N, H), (V, H) and (N,)."
        )
