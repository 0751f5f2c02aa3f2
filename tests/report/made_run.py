"""A run folder as `prl fit` leaves it, made up: 30 epochs, four of them with their completions."""

from __future__ import annotations

import csv
import json
import math
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

BETA = 0.05
EPOCHS = 30
STORED = (0, 10, 20, 29)
SAMPLED = 32  # groups, four of them with their tokens
HOSTILE = (
    "</script><script>window.stolen = true</script>",
    '<img src="x" onerror="window.stolen = true">',
    "<!-- <script> & \u2028 \u2029 ]]> {{data}} ${1} \\u003c ' \" `",
)

FIELDS = pa.schema(
    [
        ("set", pa.string()),
        ("epoch", pa.int64()),
        ("step", pa.int64()),
        ("group", pa.int64()),
        ("prompt", pa.string()),
        ("completion", pa.string()),
        ("reward", pa.float64()),
        ("outcome_advantage", pa.float64()),
        ("length", pa.int64()),
        ("finished", pa.bool_()),
        ("tokens", pa.list_(pa.string())),
        ("policy_logprobs", pa.list_(pa.float64())),
        ("ref_logprobs", pa.list_(pa.float64())),
        ("process_rewards", pa.list_(pa.float64())),
        ("advantages", pa.list_(pa.float64())),
        ("outcome_advantages", pa.list_(pa.float64())),
        ("step_ends", pa.list_(pa.bool_())),
    ]
)


def make_run(folder: Path, seed: int = 0, reference: bool = True) -> Path:
    """All files of a run; the same ones for the same seed."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    write_metrics(folder / "metrics.csv", rng)
    write_evaluations(folder / "evaluations.jsonl", rng)
    for epoch in STORED:
        rows = [row for g in range(4) for row in make_group(epoch, g, rng, reference)]
        rows += [row for g in range(4, SAMPLED) for row in make_outcomes(epoch, g, rng)]
        write_completions(folder / "completions" / f"epoch={epoch:05d}.parquet", rows)
    (folder / "config.yaml").write_text(
        "seed_everything: 0\nmodel:\n  policy: runs/arithmetic/base\n"
        "  objective: {kl: process, beta: 0.05}\n# </pre><script>window.stolen = true</script>\n"
    )
    return folder


def write_completions(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=FIELDS), file)


def write_metrics(file: Path, rng: random.Random) -> None:
    rows: list[dict[str, Any]] = []
    for epoch in range(EPOCHS):
        learnt = 1 - math.exp(-epoch / 10)

        def near(value: float, noise: float) -> float:
            return max(0.0, value + rng.gauss(0, noise))

        rows.append(
            {
                "epoch": epoch,
                "step": epoch,
                "rollout/reward": near(0.12 + 0.5 * learnt, 0.03),
                "rollout/completion_length": near(92 - 14 * learnt, 2),
                "rollout/groups_without_signal": near(0.35 - 0.3 * learnt, 0.05),
                "rollout/cut_at_limit": near(0.04 - 0.03 * learnt, 0.01),
                "rollout/engine_gap": near(3e-7, 3e-8),
                "rollout/tokens_per_second": near(5200, 400),
                "train/kl_ref": near(0.08 * learnt, 0.002),
                "train/kl_ref_k3": near(0.085 * learnt, 0.003),
                "train/entropy": near(0.26 - 0.17 * learnt, 0.008),
                "train/grad_norm": near(0.14, 0.05),
                "train/loss": rng.gauss(0, 0.01),
                "train/clip_fraction": 0.0,
                "train/process_term_mean": near(0.4 * learnt, 0.03),
                "train/process_term_std": near(0.5 * learnt, 0.03),
                "train/ratio_max": "nan" if epoch == 3 else 1.0,
                "train/advantage": rng.gauss(0, 0.004),
            }
        )
        if epoch == 0 or (epoch + 1) % 10 == 0:
            rows.append({"epoch": epoch, "step": epoch, "val/longer/mean@16": 0.1 + 0.3 * learnt})
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
            sets[name] = {
                "problems": 256,
                "samples": 16,
                "metrics": {
                    "mean@16": with_interval(p),
                    "maj@16": with_interval(min(0.95, p * 1.25)),
                    "pass@4": passes[3],
                    "pass@16": passes[15],
                    "no_answer": with_interval(0.05),
                    "length": [90.0, 88.0, 92.0],
                },
                "pass_curve": {
                    "k": list(range(1, 17)),
                    "pass": [value for value, _, _ in passes],
                    "low": [low for _, low, _ in passes],
                    "high": [high for _, _, high in passes],
                },
            }
        lines.append({"step": step, "epoch": step, "stage": "val", "sets": sets})
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def make_group(epoch: int, group: int, rng: random.Random, reference: bool) -> list[dict[str, Any]]:
    """Eight completions each of three problems that are solved at times, and of one that is not."""
    right = [0.35, 0.5, 0.7, 0.0][group]
    operations = 12 + 2 * group
    digits = [rng.randrange(10) for _ in range(operations + 1)]
    signs = [rng.choice("+-*") for _ in range(operations)]
    expression = str(digits[0]) + "".join(
        s + str(d) for s, d in zip(signs, digits[1:], strict=True)
    )
    prompt = f"{expression}?"
    if group == 1:
        prompt = HOSTILE[0] + prompt
    # The sixth was cut at the limit.
    rewards = [float(rng.random() < right and number != 5) for number in range(8)]
    mean = sum(rewards) / 8
    std = math.sqrt(sum((reward - mean) ** 2 for reward in rewards) / 8)
    rows = []
    for number, reward in enumerate(rewards):
        tokens = arithmetic_tokens(digits, signs, reward == 1.0, rng)
        advantage = (reward - mean) / std if std else 0.0
        if reward == 0.0:  # rambles on, or is cut
            tokens = tokens * 2
            del tokens[rng.randint(60, 120) :]
        if group == 1:
            tokens[6:6] = [HOSTILE[number % 3], "\n"]
        rows.append(
            {
                "set": "train",
                "epoch": epoch,
                "step": epoch,
                "group": group,
                "prompt": prompt,
                "completion": "".join(tokens),
                "reward": reward,
                "outcome_advantage": advantage,
                "length": len(tokens),
                "finished": number != 5,
                "tokens": tokens,
                **token_numbers(tokens, reward, advantage, epoch, rng),
            }
        )
        if not reference:
            rows[-1] |= {"ref_logprobs": None, "process_rewards": None}
    return rows


def make_outcomes(epoch: int, group: int, rng: random.Random) -> list[dict[str, Any]]:
    """A group without its tokens."""
    learnt = 1 - math.exp(-epoch / 10)
    rewards = [float(rng.random() < 0.12 + 0.5 * learnt) for _ in range(8)]
    lengths = [rng.gauss(92 - 14 * learnt, 14) for _ in rewards]
    return [
        {
            "set": "train",
            "epoch": epoch,
            "step": epoch,
            "group": group,
            "reward": reward,
            "outcome_advantage": reward - sum(rewards) / 8,
            "length": min(round(length), 120),
            "finished": length < 120,
        }
        for reward, length in zip(rewards, lengths, strict=True)
    ]


def arithmetic_tokens(
    digits: list[int], signs: list[str], right: bool, rng: random.Random
) -> list[str]:
    value, tokens = digits[0], []
    slip = -1 if right else rng.randrange(len(signs))
    for place, (sign, digit) in enumerate(zip(signs, digits[1:], strict=True)):
        exact = {"+": value + digit, "-": value - digit, "*": value * digit}[sign] % 10
        result = (exact + 3) % 10 if place == slip else exact
        tokens += [str(value), sign, str(digit), "=", str(result), "\n"]
        value = result
    return [*tokens, "\\boxed{", str(value), "}"]


def token_numbers(
    tokens: list[str], reward: float, advantage: float, epoch: int, rng: random.Random
) -> dict[str, Any]:
    """Log-probabilities of a policy that moved from its reference, and what follows from them."""
    moved = 0.25 * (1 - math.exp(-epoch / 10))
    policy = [-rng.expovariate(12 if token in "+-*=\n" else 3) for token in tokens]
    ref = [
        min(-1e-4, p - rng.gauss(moved * (0.3 if token in "+-*=\n" else 1.2), 2 * moved))
        for p, token in zip(policy, tokens, strict=True)
    ]
    delta = [p - q for p, q in zip(policy, ref, strict=True)]
    later = [sum(delta[place + 1 :]) for place in range(len(tokens))]
    return {
        "policy_logprobs": policy,
        "ref_logprobs": ref,
        "process_rewards": [reward - BETA * rest for rest in later],
        "advantages": [
            advantage - BETA * (rest + own) for rest, own in zip(later, delta, strict=True)
        ],
        "step_ends": [
            "\n" in token or place == len(tokens) - 1 for place, token in enumerate(tokens)
        ],
    }
