"""Models and micro-batches as fake tensors on a GPU that is not there."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from prl_lightning.data import collate
from prl_lightning.models.causal_lm import LogprobModel
from prl_lightning.types import Completion, Prompt, Rollout, RolloutBatch

# As Lightning's bf16-mixed does it.
bf16_mixed = partial(torch.autocast, "cuda", dtype=torch.bfloat16, cache_enabled=False)


@contextmanager
def fake_gpu() -> Iterator[FakeTensorMode]:
    """All tensors that are made in here are fake ones.

    transformers knows them and leaves out its checks of values, so that waits of its own are seen
    on a CPU alone.
    """
    with FakeTensorMode() as mode, _AnyGroupedProduct():
        yield mode


class _AnyGroupedProduct(TorchDispatchMode):
    """torch's rule for the shape of a grouped product refuses float32, which its kernels take."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        is_refused = func is torch.ops.aten._grouped_mm.default and args[0].dtype == torch.float32
        if not is_refused:
            return func(*args, **(kwargs or {}))
        left, right, *rest = args
        return func(left.bfloat16(), right.bfloat16(), *rest, **(kwargs or {})).float()


def fake_model(
    architecture: str,
    sizes: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    gradient_checkpointing: bool = False,
) -> LogprobModel:
    """A model on the GPU, to be made within ``fake_gpu``."""
    config = AutoConfig.for_model(architecture, **sizes)
    with torch.device("cuda"):
        causal_lm = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    plain = {"scale": 1.0}  # to find it, values are compared
    with patch("prl_lightning.models.causal_lm.logit_transform", return_value=plain):
        return LogprobModel(causal_lm, gradient_checkpointing)


def to_gpu(mode: FakeTensorMode, batch: RolloutBatch) -> RolloutBatch:
    """As ``RolloutBatch.to``, without the pinned memory that fake tensors cannot have."""

    def move(tensor: Tensor) -> Tensor:
        return mode.from_tensor(tensor).to("cuda")

    moved: dict[str, Any] = {
        k: move(v) if isinstance(v, Tensor) else v for k, v in vars(batch).items()
    }
    return RolloutBatch(**moved | {"packing": batch.packing.map(move)})


def group(completions: int, tokens: int, prompt_tokens: int = 200) -> RolloutBatch:
    """A group of completions that are all of one length, on the CPU."""
    prompt = Prompt([1] * prompt_tokens, "")
    rollouts = [
        Rollout(prompt, Completion([2] * tokens, [-1.0] * tokens, finished=False), "")
        for _ in range(completions)
    ]
    return collate(rollouts, completions * tokens, completions)


def say(name: str, result: Any) -> None:
    """Say on stderr what was found, while the rest is looked for."""
    print(f"{name}: {json.dumps(result)}", file=sys.stderr, flush=True)
