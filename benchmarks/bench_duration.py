"""Compare `prl check`'s estimate of an iteration's time with finished runs on this machine.

python benchmarks/bench_duration.py runs/smollm2/version_0 runs/arithmetic/version_0
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import yaml
from transformers import AutoTokenizer

from prl_lightning.checks.duration import (
    Work,
    costs_of,
    hardware,
    sampling_seconds,
    update_seconds,
)
from prl_lightning.runs.files import completion_files, read_metrics
from prl_lightning.runs.tables import read_table
from report import publish

ROOT = Path(__file__).parents[1]


def prompt_tokens(run: Path, policy: str) -> float:
    """The mean length of the stored prompts, as the policy reads them."""
    tokenizer = AutoTokenizer.from_pretrained(policy)
    rows = [row for file in completion_files(run) for row in read_table(file, ["prompt"])]
    prompts = {row["prompt"] for row in rows if row["prompt"]}
    if tokenizer.chat_template:
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        lengths = [
            len(tokenizer.apply_chat_template(c, add_generation_prompt=True)["input_ids"])
            for c in chats
        ]
    else:
        lengths = [len(tokenizer(prompt).input_ids) for prompt in prompts]
    return statistics.mean(lengths)


def compare(run: Path, device: object) -> dict[str, object]:
    config = yaml.safe_load((run / "config.yaml").read_text())
    policy, data = config["model"]["policy"], config["data"]
    curves = {name: values for name, (_, values) in read_metrics(run / "metrics.csv").items()}
    prompts, costs = prompt_tokens(run, policy), costs_of(policy)
    measured: dict[str, list[float]] = {"sampling": [], "update": []}
    # The first iteration starts what is started once.
    for tokens, sampled, trained in list(
        zip(
            curves["rollout/completion_length"],
            curves["rollout/sampling_seconds"],
            curves["train/seconds"],
            strict=True,
        )
    )[1:]:
        work = Work(data["prompts_per_epoch"], data["group_size"], prompts, tokens)
        measured["sampling"].append(sampling_seconds(work, costs, device, False) / sampled)
        # Forward and backward pass, and the reference.
        measured["update"].append(update_seconds(work, costs, device, False, 4) / trained)
    return {part: statistics.median(ratios) for part, ratios in measured.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/duration.json")
    args = parser.parse_args()
    device = hardware()
    results = {run.parent.name: compare(run, device) for run in args.runs}
    publish({"estimate / measured": results, "flops": device.flops}, args.out)


if __name__ == "__main__":
    main()
