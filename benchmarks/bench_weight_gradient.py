"""Rounding in the weight gradient of token_logprobs under bfloat16, and the time of each product.

    python benchmarks/bench_weight_gradient.py --out benchmarks/results/weight_gradient.json

Each block adds gradsᵀ·hidden to the gradient of the output embedding. Three ways to form it:
"rounded" rounds each block's product to bfloat16 before the float32 sum, "float32 sum" keeps the
product of bfloat16 factors in float32, "float32" does not round the factors either. token_logprobs
takes the first, and the last on a CPU without bfloat16 instructions.

Errors are relative (Frobenius norm): "alone" against the float64 product of the same factors,
"total" against a forward and backward pass in float64, which has the rounding of the logits in it.
Seconds are of forward and backward: the processor's on a CPU, so that other work does not count.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from prl_lightning.functional import logprobs, token_logprobs
from report import publish


def rounded(total: Tensor, grads: Tensor, hidden: Tensor) -> None:
    total.add_(grads.bfloat16() @ hidden.bfloat16())


def float32_sum(total: Tensor, grads: Tensor, hidden: Tensor) -> None:
    if grads.is_cuda:
        product = torch.mm(grads.bfloat16(), hidden.bfloat16(), out_dtype=torch.float32)
        total.add_(product)
    else:
        total.addmm_(grads.bfloat16().float(), hidden)


def float32(total: Tensor, grads: Tensor, hidden: Tensor) -> None:
    total.addmm_(grads, hidden)


def in_float64(total: Tensor, grads: Tensor, hidden: Tensor) -> None:
    total.add_(grads.double() @ hidden.double())


VARIANTS = {"rounded": rounded, "float32 sum": float32_sum, "float32": float32}


def inputs(args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states near the row of the target, as those of a policy that is sure of its tokens.

    Returns hidden states, weight, targets and the gradient of the log-probabilities.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    weight = torch.randn(args.vocab, args.hidden, device=device) / args.hidden**0.5
    targets = torch.randint(args.vocab, (args.tokens,), device=device)
    hidden = torch.randn(args.tokens, args.hidden, device=device) + args.logit * weight[targets]
    slopes = torch.randn(args.tokens, device=device) / args.tokens
    return hidden.bfloat16(), weight.bfloat16(), targets, slopes


def gradient(
    hidden: Tensor, weight: Tensor, targets: Tensor, slopes: Tensor, max_logits: int | None
) -> tuple[Tensor, float]:
    """The weight's gradient in float32, or float64 if the inputs are, and the mean entropy."""
    leaf = weight.to(torch.promote_types(weight.dtype, torch.float32)).requires_grad_()
    values, entropy = token_logprobs(hidden, leaf, targets, max_logits=max_logits)
    values.backward(slopes.to(values.dtype))
    assert leaf.grad is not None
    return leaf.grad, entropy.mean().item()


def with_product(product: Callable[[Tensor, Tensor, Tensor], None], *args: Any) -> Tensor:
    """The gradient with this product of unrounded factors."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(logprobs, "_add_product", product))
        stack.enter_context(
            patch.object(logprobs, "_dtype_of_weight_product", lambda weight, dtype: dtype)
        )
        return gradient(*args)[0]


def seconds_of(work: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Time one call; the clock on a GPU."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    start = clock()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - start, result


def relative(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=882)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--vocab", type=int, default=152_000)
    parser.add_argument("--max-logits", type=int, help="in a block; by default automatic")
    parser.add_argument("--logit", type=float, default=20.0, help="of the target, over the others")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    hidden, weight, *rest = inputs(args)
    exact, entropy = gradient(hidden.double(), weight.double(), *rest, args.max_logits)
    alone = with_product(in_float64, hidden, weight, *rest, args.max_logits).double()
    errors: dict[str, dict[str, float]] = {"alone": {}, "total": {}}
    seconds = dict.fromkeys(VARIANTS, float("inf"))
    for _ in range(args.repeats):
        for name, product in VARIANTS.items():
            elapsed, found = seconds_of(
                lambda product=product: with_product(  # type: ignore[misc]
                    product, hidden, weight, *rest, args.max_logits
                )
            )
            seconds[name] = min(seconds[name], elapsed)
            errors["alone"][name] = relative(found, alone)
            errors["total"][name] = relative(found, exact)
    result = {
        "sizes": {
            name: getattr(args, name) for name in ("tokens", "hidden", "vocab", "max_logits")
        },
        "mean_entropy": entropy,
        "relative_error": errors,
        "seconds": seconds,
        "ratio_of_seconds": {name: s / seconds["rounded"] for name, s in seconds.items()},
    }
    publish(result, args.out)


if __name__ == "__main__":
    main()
