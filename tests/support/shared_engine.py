"""What each of two ranks with one engine does in tests/sampling/test_shared_engine.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn

from prl_lightning.cli import main
from prl_lightning.models.causal_lm import named_weights
from prl_lightning.models.loading import load_policy
from prl_lightning.sampling import SamplingConfig, VLLMSampler
from prl_lightning.types import Completion, Prompt

PROMPTS = [
    Prompt(ids, "", seed=11 + 100 * row)
    for row, ids in enumerate([[5, 14, 7, 17], [9], [4 + i % 9 for i in range(70)], [6, 13, 8]])
]
SAMPLING = SamplingConfig(n=4, temperature=1.0, max_new_tokens=12, stop_token_ids=(1,))
# Rows of PROMPTS that each of the ranks has.
SHARES = {"one and three": [[2], [0, 1, 3]], "all and none": [[0, 1, 2, 3], []], "none": [[], []]}


def work(model: str, root: str, commands: Sequence[Sequence[str]]) -> None:
    """Run the commands, then use an engine directly: the processes load vLLM only once."""
    for command in commands:
        main(command)
    rank = distributed.get_rank()
    torch.save(sample(model, rank), Path(root) / f"samples-{rank}.pt")
    distributed.destroy_process_group()


def sample(model: str, rank: int) -> dict[str, Any]:
    """Completions and reports of each division of the prompts, and what a failed report raises."""
    sampler = VLLMSampler(cache_gib=0.1, tensor_parallel_size=2)
    sampler.start(model, 128)
    sampler.load_weights(named_weights(load_policy(model)))
    found: dict[str, Any] = {"parts": sampler._llm.apply_model(parts)[0]}
    for name, shares in SHARES.items():
        reports: list[tuple[Mapping[int, list[Completion]], int]] = []
        own = [PROMPTS[row] for row in shares[rank]]
        groups = sampler.generate(own, SAMPLING, lambda *report, to=reports: to.append(report))
        finished = {row: group for some, _ in reports for row, group in some.items()}
        found[name] = (groups, finished, sum(tokens for _, tokens in reports))
    found["error"] = failure(sampler, rank)
    found["after it"] = sampler.generate(PROMPTS[:1], SAMPLING)
    sampler.stop()
    return found


def parts(engine: nn.Module) -> list[float]:
    """This rank's part of each matrix; vLLM's CPU build packs the matrices themselves."""
    layers: list[Any] = [m for m in engine.modules() if hasattr(m, "output_size_per_partition")]
    return [
        layer.input_size_per_partition * layer.output_size_per_partition
        / (layer.input_size * layer.output_size)
        for layer in layers
    ]  # fmt: skip


def failure(sampler: VLLMSampler, rank: int) -> str:
    def fail(finished: Any, count: int) -> None:
        if rank == 1:
            raise OSError("no space left")

    try:
        sampler.generate(PROMPTS, SAMPLING, fail)
    except (OSError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "none"
