"""FSDP1 without a GPU, which Lightning refuses and torch can: what is ours of it runs in CI."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import enable_wrap


class FSDP1OnCPU(FSDPStrategy):
    """Lightning looks for the class itself, and torch for a device by its index."""

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        with enable_wrap(
            wrapper_cls=FullyShardedDataParallel,
            mixed_precision=self.mixed_precision_config,
            sharding_strategy=self.sharding_strategy,
            device_id=torch.device("cpu"),
            **self.kwargs,
        ):
            yield
