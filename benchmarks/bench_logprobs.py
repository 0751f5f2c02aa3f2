"""Memory and time of token_logprobs against full logits, forward and backward.

    python benchmarks/bench_logprobs.py --out benchmarks/results/logprobs.json

Memory is what the process (or the GPU) needs at its peak beyond inputs and their gradients, each
variant in a process of its own. Times are taken in turn in one process.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from prl_lightning.functional import token_logprobs
from report import publish

Logprobs = Callable[[Tensor, Tensor, Tensor], Tensor]


def full_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """As most trainers do it: all logits, their log-softmax, the entropy for the log."""
    logits = (hidden @ weight.T).float()
    logprobs = logits.log_softmax(-1)
    with torch.no_grad():
        (logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, targets[:, None]).squeeze(-1)


def in_chunks(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return token_logprobs(hidden, weight, targets)[0]


VARIANTS: dict[str, Logprobs] = {"token_logprobs": in_chunks, "full logits": full_logits}


def inputs(args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    hidden = torch.randn(args.tokens, args.hidden, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(args.vocab, args.hidden, device=device, dtype=dtype)
    weight.div_(args.hidden**0.5)  # in place: the peak of a copy would hide what is measured
    targets = torch.randint(args.vocab, (args.tokens,), device=device)
    return hidden, weight.requires_grad_(), targets


def once(variant: Logprobs, hidden: Tensor, weight: Tensor, targets: Tensor) -> float:
    """Seconds of a forward and backward pass."""
    start = time.perf_counter()
    variant(hidden, weight, targets).sum().backward()
    if hidden.is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    hidden.grad = weight.grad = None
    return seconds


def peak_mib(name: str, args: argparse.Namespace) -> float:
    """Of this process: what it needs beyond inputs and gradients."""
    hidden, weight, targets = inputs(args)
    results = sum(t.numel() * t.element_size() for t in (hidden, weight)) / 2**20
    if hidden.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        once(VARIANTS[name], hidden, weight, targets)
        return (torch.cuda.max_memory_allocated() - before) / 2**20 - results
    # A small product first, so that what the library sets up once is not counted.
    (torch.randn(64, 64) @ torch.randn(64, 64)).sum()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    once(VARIANTS[name], hidden, weight, targets)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10 - before - results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=152_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory-of", choices=VARIANTS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.memory_of:
        print(peak_mib(args.memory_of, args))
        return
    sizes = [f"--{name}={getattr(args, name)}" for name in ("tokens", "hidden", "vocab")]
    memory = {
        name: float(
            subprocess.check_output([sys.executable, __file__, *sizes, f"--memory-of={name}"])
        )
        for name in VARIANTS
    }
    tensors = inputs(args)
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for repeat in range(args.repeats + 1):
        for name, variant in VARIANTS.items():
            elapsed = once(variant, *tensors)
            if repeat:
                seconds[name].append(elapsed)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    ours, full = VARIANTS
    result = {
        "sizes": {name: getattr(args, name) for name in ("tokens", "hidden", "vocab")},
        "extra_mib": memory,
        "seconds": median,
        "ratio_of_memory": memory[ours] / memory[full],
        "ratio_of_seconds": median[ours] / median[full],
    }
    publish(result, args.out)


if __name__ == "__main__":
    main()
