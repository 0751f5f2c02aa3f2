"""A reward that draws at random, in a module that loads as little as it can."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from sample_rewards import even_digits


def noisy_digits(completions: list[str], **columns: Any) -> list[float]:
    """Training goes on exactly only with the random states of Python, numpy and torch."""
    return [
        reward + random.random() + float(np.random.rand()) + torch.rand(()).item()
        for reward in even_digits(completions)
    ]
