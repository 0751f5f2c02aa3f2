"""Log-probabilities and entropy from hidden states, without a (tokens, vocabulary) tensor.

At a vocabulary of 152 thousand, the float32 logits of a micro-batch of 16 thousand tokens take
10 GB, and autograd keeps several such tensors. Here they exist for one block of tokens and
vocabulary at a time, and the backward pass recomputes them.
"""

from collections.abc import Iterator
from math import isqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from prl_lightning.functional.precision import has_bf16_instructions

_BLOCK_LOGITS = {"cpu": 2**22, "cuda": 2**27}
"""Logits in an automatic block: 16 MiB in float32 on a CPU, whose caches they pass through several
times, and 512 MiB on a GPU, which needs large products to be busy."""


def token_logprobs(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    max_logits: int | None = None,
    scale: float = 1.0,
    cap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return log π(target | hidden) and the entropy of π = softmax(logits / temperature).

    log π(a) = z_a - log Σ_v exp z_v and entropy = log Σ_v exp z_v - Σ_v π_v z_v. The logits are
    scale·hidden·Wᵀ, or with a cap c (softcapping) c·tanh(scale·hidden·Wᵀ/c), and z = logits/τ.
    Forward and backward hold the logits of one block of tokens and vocabulary at a time, in at most
    two buffers. The parts of a softmax are summed as in online softmax (arXiv 1805.02867).

    The matrix product runs in the dtype of `hidden`, or of autocast if it is on. Softmax and sums
    over blocks are in float32, or float64 if `hidden` is. On a CPU without bfloat16 instructions
    the product that forms the weight's gradient is in float32, too.

    Args:
        hidden: last hidden states, (N, H).
        head_weight: the output embedding, (V, H).
        targets: token ids in [0, V), (N,).
        temperature: of sampling, above 0.
        max_logits: most logits in a block, at least 1; None derives it from the device.
        scale: multiplies the logits.
        cap: tanh keeps every logit between its negative and it; None for no cap.

    Returns:
        Log-probabilities (N,), differentiable in hidden and head_weight, and entropies (N,) in
        nats, not differentiable. Both float32, or float64 if `hidden` is.

    Raises:
        ValueError: shapes disagree, or temperature, max_logits or cap is out of range.

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
    if max_logits is None:
        max_logits = _BLOCK_LOGITS.get(hidden.device.type, _BLOCK_LOGITS["cpu"])
    if max_logits < 1:
        raise ValueError(f"max_logits={max_logits}: use at least 1, or None for automatic.")
    block = _block(len(hidden), len(head_weight), max_logits)
    logprobs, entropy = _TokenLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden, head_weight, targets, _Transform(scale, cap, temperature), block
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


class _Softmax(NamedTuple):
    """Sums over a part of the vocabulary, relative to its maximum so that exp does not overflow."""

    peak: Tensor  # max z, (N,)
    total: Tensor  # Σ exp(z - peak), (N,)
    weighted: Tensor  # Σ exp(z - peak)·(z - peak), (N,)

    @classmethod
    def of_nothing(cls, like: Tensor) -> "_Softmax":
        """Before the first part; a finite maximum, since 0·inf is not 0."""
        lowest = torch.finfo(like.dtype).min / 2
        return cls(torch.full_like(like, lowest), torch.zeros_like(like), torch.zeros_like(like))

    @classmethod
    def of_(cls, logits: Tensor) -> "_Softmax":
        """Overwrites the logits."""
        peak = logits.amax(1)
        exponentials = logits.sub_(peak[:, None]).exp()
        total = exponentials.sum(1)
        return cls(peak, total, exponentials.mul_(logits).sum(1))

    def relative_to(self, peak: Tensor) -> "_Softmax":
        shift = self.peak - peak
        factor = shift.exp()
        return _Softmax(peak, self.total * factor, (self.weighted + self.total * shift) * factor)

    def add_(self, rows: slice, part: "_Softmax") -> None:
        """Add another part of the vocabulary to these rows."""
        before = _Softmax(*(sums[rows] for sums in self))
        peak = torch.maximum(before.peak, part.peak)
        one, two = before.relative_to(peak), part.relative_to(peak)
        self.peak[rows] = peak
        self.total[rows] = one.total + two.total
        self.weighted[rows] = one.weighted + two.weighted


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head_weight: Tensor,
        targets: Tensor,
        transform: _Transform,
        block: tuple[int, int],
    ) -> tuple[Tensor, Tensor]:
        product_dtype = _product_dtype(hidden)
        sum_dtype = torch.promote_types(hidden.dtype, torch.float32)
        picked = hidden.new_zeros(len(hidden), dtype=sum_dtype)
        softmax = _Softmax.of_nothing(picked)
        for ids in _slices(len(head_weight), block[1]):
            weight = head_weight[ids].to(product_dtype)
            for rows in _slices(len(hidden), block[0]):
                logits = _logits(hidden[rows], weight, transform, sum_dtype)
                columns, is_inside = _columns(targets[rows], ids)
                found = logits.gather(1, columns).squeeze(1)
                picked[rows] = torch.where(is_inside, found, picked[rows])
                softmax.add_(rows, _Softmax.of_(logits))
                del logits, found  # free the memory before the next block
        log_total = softmax.total.log()
        log_normalizer = softmax.peak + log_total
        logprobs, entropy = picked - log_normalizer, log_total - softmax.weighted / softmax.total
        ctx.save_for_backward(hidden, head_weight, targets, log_normalizer)
        ctx.transform, ctx.block, ctx.product_dtype = transform, block, product_dtype
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        hidden, head_weight, targets, log_normalizer = ctx.saved_tensors
        dtype = log_normalizer.dtype
        slopes = grad_logprobs.to(dtype) * ctx.transform.slope
        grad_hidden = torch.zeros_like(hidden, dtype=dtype) if ctx.needs_input_grad[0] else None
        grad_weight = torch.empty_like(head_weight) if ctx.needs_input_grad[1] else None
        for ids in _slices(len(head_weight), ctx.block[1]):
            weight = head_weight[ids].to(ctx.product_dtype)
            # The vocabulary is the outer loop, so that a row of the weight's gradient is summed at
            # once: in place if its dtype is that of sums.
            total = None if grad_weight is None else grad_weight[ids].to(dtype).zero_()
            for rows in _slices(len(hidden), ctx.block[0]):
                logits = _logits(hidden[rows], weight, ctx.transform, dtype)
                # ∂ log π(a)/∂z = onehot(a) - π, in place of the logits unless a cap needs them.
                grads = logits if ctx.transform.cap is None else logits.clone()
                grads.sub_(log_normalizer[rows, None]).exp_().mul_(-slopes[rows, None])
                columns, is_inside = _columns(targets[rows], ids)
                grads.scatter_add_(1, columns, (slopes[rows] * is_inside)[:, None])
                grads = ctx.transform.bend_(grads, logits)
                del logits
                grads = grads.to(_dtype_of_weight_product(weight, dtype))
                if grad_hidden is not None:
                    _add_product(grad_hidden[rows], grads.to(weight.dtype), weight)
                if total is not None:
                    _add_product(total, grads.T, hidden[rows].to(grads.dtype))
                del grads  # free the memory before the next block
            if grad_weight is not None and total is not None and grad_weight.dtype != dtype:
                grad_weight[ids] = total
        if grad_hidden is not None:
            grad_hidden = grad_hidden.to(hidden.dtype)
        return grad_hidden, grad_weight, None, None, None


def _logits(hidden: Tensor, weight: Tensor, transform: _Transform, dtype: torch.dtype) -> Tensor:
    return transform.apply_((hidden.to(weight.dtype) @ weight.T).to(dtype))


def _dtype_of_weight_product(weight: Tensor, sum_dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the product that forms the weight's gradient.

    Rounding it to bfloat16 hardly adds to the error of the gradient, which is that of the logits
    (benchmarks/bench_weight_gradient.py). Without bfloat16 instructions float32 is faster as well.
    """
    return sum_dtype if weight.is_cpu and not has_bf16_instructions() else weight.dtype


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left·right in place."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        # The product stays in low precision, which is fast; only the sum over blocks needs more.
        total.add_(left @ right)


def _block(tokens: int, vocabulary: int, logits: int) -> tuple[int, int]:
    """Return the tokens and the vocabulary of a block: all tokens, unless it would be narrow."""
    ids = min(vocabulary, max(logits // max(1, tokens), isqrt(logits)))
    return max(1, logits // ids), ids


def _slices(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def _columns(targets: Tensor, ids: slice) -> tuple[Tensor, Tensor]:
    """Return the columns (N, 1) of targets in a block, and which (N,) are in it."""
    columns = targets - ids.start
    is_inside = (columns >= 0) & (targets < ids.stop)
    return columns.clamp(0, ids.stop - ids.start - 1)[:, None], is_inside


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
