"""The time that packed rows save in scoring and training.

    python benchmarks/bench_update.py --out benchmarks/results/update.json

Reference, forward and backward pass of two groups of 8, with the 21M model, in turn in one process.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from prl_lightning.data import collate
from prl_lightning.models.causal_lm import LogprobModel
from prl_lightning.models.loading import load_policy
from prl_lightning.types import Completion, Prompt, Rollout, RolloutBatch
from report import publish
from work import Work, make

BASE = Work(hidden=512, layers=8, heads=8, prompts=2, max_new_tokens=128)
WORKS = {
    "prompt 16, completions 128": BASE,
    "prompt 16, completions lognormal": replace(BASE, lengths="lognormal"),
    "prompt 128, completions 128": replace(BASE, prompt_tokens=128),
}
VARIANTS = {"padded": False, "packed": True}


def batch_of(work: Work) -> RolloutBatch:
    """Random tokens, without the first few, which are special."""
    draw = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(4, work.vocab, (count,), generator=draw).tolist()

    rollouts = []
    for lengths in work.completion_lengths(0):
        prompt = Prompt(tokens(work.prompt_tokens), "")
        rollouts += [Rollout(prompt, Completion(tokens(n), [0.0] * n, True), "") for n in lengths]
    return collate(rollouts, 1, 1)


def variant(model: str, packed: bool) -> LogprobModel:
    policy = load_policy(model)
    if not packed:
        policy.causal_lm.set_attn_implementation("sdpa")
        policy.is_packed = False
    return policy


def seconds(policy: LogprobModel, batch: RolloutBatch) -> float:
    start = time.perf_counter()
    with torch.no_grad():
        policy(batch)
    policy(batch)[0].sum().backward()
    return time.perf_counter() - start


def measure(work: Work, rounds: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        make(work, Path(folder), 1)
        policies = {name: variant(f"{folder}/model", packed) for name, packed in VARIANTS.items()}
    batch = batch_of(work)
    times: dict[str, list[float]] = {name: [] for name in policies}
    for _ in range(1 + rounds):
        for name, policy in policies.items():
            times[name].append(seconds(policy, batch))
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", default=7, type=int)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    measured = {name: measure(work, args.rounds) for name, work in WORKS.items()}
    ratios = {
        name: {variant: round(value / times["padded"], 3) for variant, value in times.items()}
        for name, times in measured.items()
    }
    result = {"seconds": measured, "ratio_to_padded": ratios}
    publish(result, args.out)


if __name__ == "__main__":
    main()
