"""The stored completions of one epoch, in groups, with the values of each token."""

from __future__ import annotations

from itertools import groupby
from math import isfinite
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from prl_lightning.runs.tables import read_table

# Per epoch, in whole groups: twelve epochs of this size take about 20 MB.
MAX_TOKENS = 30_000


def read_epoch(file: Path) -> dict[str, Any]:
    """Read the completions of one epoch.

    Args:
        file: one row per completion, groups contiguous; some groups have no tokens.

    Returns:
        Rewards and lengths of all completions, and the groups with tokens in order of decreasing
        signal. Groups beyond ``MAX_TOKENS`` are counted but left out.
    """
    rows = read_table(file)
    whole = [row for row in rows if row["tokens"] is not None]
    groups = [_group(list(members)) for _, members in groupby(whole, key=lambda row: row["group"])]
    groups.sort(key=lambda group: -group["std"])
    kept: list[dict[str, Any]] = []
    tokens = 0
    for group in groups:
        tokens += sum(len(completion["tokens"]) for completion in group["completions"])
        if kept and tokens > MAX_TOKENS:
            break
        kept.append(group)
    return {
        "epoch": rows[0]["epoch"] if rows else int(file.stem.partition("=")[2]),
        "step": rows[0]["step"] if rows else 0,
        "rewards": [row["reward"] for row in rows],
        "lengths": [row["length"] for row in rows],
        "finished": [row["finished"] for row in rows],
        "groups": kept,
        "groups_stored": len(groups),
        "groups_sampled": len({row["group"] for row in rows}),
    }


def _group(rows: list[dict[str, Any]]) -> dict[str, Any]:
    rewards = [row["reward"] for row in rows]
    known = [reward for reward in rewards if reward is not None and isfinite(reward)] or [0.0]
    return {
        "set": rows[0].get("set", "train"),
        "prompt": rows[0]["prompt"],
        "mean": fmean(known),
        "std": pstdev(known),
        "completions": [_completion(row) for row in rows],
    }


def _completion(row: dict[str, Any]) -> dict[str, Any]:
    """Return one completion. Differences are taken here, before numbers are rounded."""
    tokens = row["tokens"]
    is_sampled = row.get("is_sampled") or [True] * len(tokens)
    policy, reference, advantages, process = (
        _where(is_sampled, row[name])
        for name in ("policy_logprobs", "ref_logprobs", "advantages", "process_rewards")
    )
    ends = [place for place, is_end in enumerate(row["step_ends"] or []) if is_end]
    completion = {
        "reward": row["reward"],
        "outcome_advantage": row["outcome_advantage"],
        "length": row["length"],
        "finished": row["finished"],
        "tokens": tokens,
        "context": [place for place, own in enumerate(is_sampled) if not own],
        "step_ends": ends if len(ends) < len(tokens) else [],  # no marks if each token is a step
        "policy": policy,
        "reference": reference,
        "log_ratio": reference and _less(policy, reference),
        "advantage": advantages,
        # The outcome advantage is one number per token if the KL is part of the reward.
        "advantage_part": _less(
            advantages, row.get("outcome_advantages") or row["outcome_advantage"]
        ),
        "process": process,
        "process_part": _less(process, row["reward"]),
    }
    # A single token may decode to a part of a character or lose its space.
    if row["completion"] not in "".join(tokens):
        completion["text"] = row["completion"]
    return completion


Numbers = list[float | None]


def _where(is_sampled: list[bool], values: Numbers | None) -> Numbers | None:
    """Leave out the values of tokens that the policy has not sampled: nothing is trained there."""
    if values is None or all(is_sampled):
        return values
    return [value if own else None for value, own in zip(values, is_sampled, strict=True)]


def _less(values: Numbers | None, other: Numbers | float) -> Numbers | None:
    """Subtract one number, or one number per token."""
    if not values:
        return values
    others = other if isinstance(other, list) else [other] * len(values)
    return [
        None if value is None or own is None else value - own
        for value, own in zip(values, others, strict=True)
    ]
