"""The memory of an optimizer, counted on a probe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

from prl_lightning.checks.memory import _state_share
from prl_lightning.module import PRLModule


class Wrapped(torch.optim.SGD):
    """Keep a wrapper of one half-precision tensor and one of bytes for each weight."""

    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            half, small = torch.zeros_like(parameter).half(), torch.zeros(128, 128).to(torch.uint8)
            self.state[parameter]["moments"] = TwoTensor(half, small.half())


@pytest.mark.parametrize(
    ("optimizer", "share"),
    [
        (torch.optim.AdamW, 2),  # and the number of steps, once
        (torch.optim.SGD, 0),
        (lambda p: torch.optim.SGD(p, momentum=0.9), 1),
        (torch.optim.Adafactor, (128 + 128) / (128 * 128)),  # a row and a column
        (Wrapped, (2 + 2) / 4),
    ],
)
def test_what_an_optimizer_keeps(optimizer: Callable[..., Any], share: float) -> None:
    assert _state_share(PRLModule("none", optimizer=optimizer)) == pytest.approx(share, rel=1e-6)
