"""A synthetic run folder like that of `prl fit`: 30 epochs, four of them with completions."""

from __future__ import annotations

import csv
import json
import math
import random
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from prl_lightning.runs.tables import write_table

BETA = 0.05
EPOCHS = 30
STORED = (0, 10, 20, 29)
SAMPLED = 32  # groups, four of them with their tokens
HOSTILE = (
    "</script><script>window.stolen = true</script>",
    '<img src="x" onerror="window.stolen = true">',
    "<!-- <script> & \u2028 \u2029 ]]> {{data}} ${1} \\u003c ' \" `",
)

# First value, change while the policy learns, and noise.
METRICS = {
    "rollout/reward": (0.12, 0.5, 0.03),
    "rollout/completion_length": (92, -14, 2),
    "rollout/groups_without_signal": (0.35, -0.3, 0.05),
    "rollout/cut_at_limit": (0.04, -0.03, 0.01),
    "rollout/engine_gap": (3e-7, 0, 3e-8),
    "rollout/tokens_per_second": (5200, 0, 400),
    "train/kl_ref": (0, 0.08, 0.002),
    "train/kl_ref_k3": (0, 0.085, 0.003),
    "train/entropy": (0.26, -0.17, 0.008),
    "train/grad_norm": (0.14, 0, 0.05),
    "train/loss": (0, 0, 0.01),
    "train/process_term_mean": (0, 0.4, 0.03),
    "train/process_term_std": (0, 0.5, 0.03),
}


def make_run(folder: Path, seed: int = 0, reference: bool = True) -> Path:
    """Write all files of a run; the same files for the same seed."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    write_metrics(folder / "metrics.csv", rng)
    write_evaluations(folder / "evaluations.jsonl", rng)
    for epoch in STORED:
        rows = [row for g in range(4) for row in make_group(epoch, g, rng, reference)]
        rows += [row for g in range(4, SAMPLED) for row in make_outcomes(epoch, g, rng)]
        write_table(folder / "completions" / f"epoch={epoch:05d}.parquet", rows)
    (folder / "config.yaml").write_text(
        "seed_everything: 0\nmodel:\n  policy: runs/arithmetic/base\n"
        "  objective: {kl: process, beta: 0.05}\n# </pre><script>window.stolen = true</script>\n"
    )
    return folder


def write_metrics(file: Path, rng: random.Random) -> None:
    rows: list[dict[str, Any]] = []
    for epoch in range(EPOCHS):
        learnt = 1 - math.exp(-epoch / 10)
        row = {
            name: max(0.0, first + change * learnt + rng.gauss(0, noise))
            for name, (first, change, noise) in METRICS.items()
        }
        at = {"epoch": epoch, "step": epoch}
        rows.append(at | row | {"train/ratio_max": "nan" if epoch == 3 else 1.0})
        if epoch == 0 or (epoch + 1) % 10 == 0:
            rows.append(at | {"val/longer/mean@16": 0.1 + 0.3 * learnt})
    names = sorted({name for row in rows for name in row})
    with file.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, names)
        writer.writeheader()
        writer.writerows(rows)


def write_evaluations(file: Path, rng: random.Random) -> None:
    def with_interval(value: float) -> list[float]:
        return [value, value - 0.03 - rng.random() * 0.01, value + 0.03 + rng.random() * 0.01]

    lines = []
    for step in (0, 10, 20, 30):
        sets = {}
        for name, start, gain in (("same", 0.12, 0.5), ("longer", 0.04, 0.16)):
            p = start + gain * (1 - math.exp(-step / 10))
            passes = [
                with_interval(0.04 + 0.92 * (1 - (1 - p) ** (0.55 * k))) for k in range(1, 17)
            ]
            curve = dict(zip(("pass", "low", "high"), zip(*passes, strict=True), strict=True))
            metrics = {
                "mean@16": with_interval(p),
                "maj@16": with_interval(min(0.95, p * 1.25)),
                "pass@4": passes[3],
                "pass@16": passes[15],
                "no_answer": with_interval(0.05),
                "length": [90.0, 88.0, 92.0],
            }
            pass_curve = {"k": list(range(1, 17))} | curve
            sets[name] = {"problems": 256, "metrics": metrics, "pass_curve": pass_curve}
        lines.append({"step": step, "epoch": step, "stage": "val", "sets": sets})
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def make_group(epoch: int, group: int, rng: random.Random, reference: bool) -> list[dict[str, Any]]:
    """Eight completions of one of three problems with some solutions, or of one without any."""
    # The sixth was cut at the limit.
    right = [0.35, 0.5, 0.7, 0.0][group]
    rewards = [float(rng.random() < right and number != 5) for number in range(8)]
    std = pstdev(rewards)
    rows = []
    for number, reward in enumerate(rewards):
        tokens = [rng.choice("0123456789+-*=\n") for _ in range(rng.randint(60, 120))]
        if group == 1:
            tokens[6:6] = [HOSTILE[number % 3], "\n"]
        advantage = (reward - fmean(rewards)) / std if std else 0.0
        row = {
            **outcome(epoch, group, reward, len(tokens), is_finished=number != 5),
            "outcome_advantage": advantage,
            "prompt": f"{HOSTILE[0] if group == 1 else ''}problem {group}?",
            "completion": "".join(tokens),
            "tokens": tokens,
            **token_numbers(tokens, reward, advantage, epoch, rng),
        }
        rows.append(row if reference else row | {"ref_logprobs": None, "process_rewards": None})
    return rows


def make_outcomes(epoch: int, group: int, rng: random.Random) -> list[dict[str, Any]]:
    """A group that is stored without its tokens."""
    lengths = [min(round(rng.gauss(85, 14)), 120) for _ in range(8)]
    return [
        outcome(epoch, group, float(rng.random() < 0.4), length, is_finished=length < 120)
        for length in lengths
    ]


def outcome(
    epoch: int, group: int, reward: float, length: int, is_finished: bool
) -> dict[str, Any]:
    at = {"set": "train", "epoch": epoch, "step": epoch, "group": group}
    own = {"reward": reward, "outcome_advantage": 0.0, "length": length, "finished": is_finished}
    return at | own


def token_numbers(
    tokens: list[str], reward: float, advantage: float, epoch: int, rng: random.Random
) -> dict[str, Any]:
    """Log-probabilities of a policy that has moved from its reference, and the credit."""
    moved = 0.25 * (1 - math.exp(-epoch / 10))
    policy = [-rng.expovariate(3) for _ in tokens]
    ref = [min(-1e-4, p - rng.gauss(moved, 2 * moved)) for p in policy]
    delta = [p - q for p, q in zip(policy, ref, strict=True)]
    rest = [sum(delta[place:]) for place in range(len(tokens) + 1)]
    return {
        "policy_logprobs": policy,
        "ref_logprobs": ref,
        "process_rewards": [reward - BETA * later for later in rest[1:]],
        "advantages": [advantage - BETA * own_and_later for own_and_later in rest[:-1]],
        "step_ends": ["\n" in token for token in tokens[:-1]] + [True],
    }
