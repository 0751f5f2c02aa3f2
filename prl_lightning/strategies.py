"""Strategies by name, beside Lightning's: ``trainer.strategy: fsdp2``."""

from __future__ import annotations

from datetime import timedelta

from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch.distributed.constants import default_pg_timeout


class FSDP2Strategy(ModelParallelStrategy):
    """FSDP2 over all ranks, however many the Trainer has.

    Lightning's own wants the number of ranks written down a second time, as
    ``data_parallel_size``, and by default takes those of a node for tensor parallelism.

    Args:
        save_distributed_checkpoint: every rank writes its own part, into a folder; otherwise rank
            zero writes one file.
        process_group_backend: by default NCCL for GPUs and Gloo for CPUs.
        timeout: of a collective.
    """

    def __init__(
        self,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__("auto", 1, save_distributed_checkpoint, process_group_backend, timeout)

    def setup_environment(self) -> None:
        """Every rank is a data-parallel one."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="FSDP2 over all ranks")
