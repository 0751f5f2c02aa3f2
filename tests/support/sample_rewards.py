"""Reward functions as a user would write them, for tests to name by import path."""

from __future__ import annotations

import os
import time
from typing import Any


def even_digits(completions: list[str], **columns: Any) -> list[float]:
    """1 for an even number of digits: an untrained model gets some right and some wrong."""
    return [float(sum(map(str.isdigit, text)) % 2 == 0) for text in completions]


def odd_digits(completions: list[str], **columns: Any) -> list[float]:
    """The others."""
    return [1.0 - reward for reward in even_digits(completions)]


def always_raises(completions: list[str], **columns: Any) -> list[float]:
    raise KeyError("no such thing")


def one_short(completions: list[str], **columns: Any) -> list[float]:
    return [0.0] * (len(completions) - 1)


def needs_gold(completions: list[str], gold: list[str]) -> list[float]:
    return [float(text == want) for text, want in zip(completions, gold, strict=True)]


def raises_on_odd(completions: list[str], **columns: Any) -> list[float]:
    if 0.0 in even_digits(completions):
        raise ValueError("an odd number of digits")
    return [2.0 for _ in completions]


def raises_on_last_rank(completions: list[str], **columns: Any) -> list[float]:
    if os.environ["LOCAL_RANK"] == "1":
        raise ValueError("the other rank")
    return even_digits(completions)


def hangs_at_times(completions: list[str], **columns: Any) -> list[float]:
    if any(text.startswith("99") for text in completions):
        time.sleep(1000)
    return [0.0 for _ in completions]


def takes_its_time(completions: list[str], **columns: Any) -> list[float]:
    time.sleep(0.02 * len(completions))
    return even_digits(completions)
