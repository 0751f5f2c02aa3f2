"""EngineRanks: the ranks of the trainer that share one engine."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed

from prl_lightning.sampling.base import Progress, local_rank
from prl_lightning.types import Completion, Prompt


@dataclass(frozen=True)
class Gathered:
    """The prompts of all ranks of an engine.

    Attributes:
        prompts: in the order of the ranks, equal on all of them.
        own: rows of this rank's prompts.
    """

    prompts: list[Prompt]
    own: range


class OwnProgress:
    """Report an engine's progress on the prompts of this rank, and keep an exception of the report.

    The ranks of an engine compute every step together: one that left in the middle would block the
    others. An exception is therefore raised after the last step, by ``EngineRanks.check``.

    Args:
        own: rows of this rank.
        on_progress: see ``Sampler.generate``.
        is_alone: raise at once, because no other rank waits.
    """

    def __init__(self, own: range, on_progress: Progress, is_alone: bool) -> None:
        self.own = own
        self.error: Exception | None = None
        self._on_progress = on_progress
        self._is_alone = is_alone

    def __call__(self, finished: Mapping[int, list[Completion]], tokens: int) -> None:
        """Report finished groups, by the row among all prompts, and this rank's new tokens."""
        if self.error is not None:
            return
        groups = {row - self.own.start: finished[row] for row in finished if row in self.own}
        try:
            self._on_progress(groups, tokens)
        except Exception as error:
            if self._is_alone:
                raise
            self.error = error


class EngineRanks:
    """``size`` neighbouring ranks with one engine; this process is one of them.

    Each has a part of every weight. All of them schedule and sample the same, so they need the same
    prompts in the same order. All ranks of the trainer must create it together.

    Args:
        size: 1 if each rank has its own engine.

    Raises:
        ValueError: the trainer's ranks cannot be divided like this.
    """

    def __init__(self, size: int = 1) -> None:
        ranks = distributed.get_world_size() if distributed.is_initialized() else 1
        if ranks % size:
            raise ValueError(indivisible_ranks(size, ranks))
        self.size = size
        self._group: Any = None
        if size > 1:
            # Prompts are in main memory, so not NCCL.
            create: Any = distributed.new_subgroups
            self._group, _ = create(size, backend="gloo")

    def gather(self, prompts: Sequence[Prompt]) -> Gathered:
        """Collect the prompts of the engine's ranks; each of them must call this.

        Args:
            prompts: of this rank, any number.
        """
        if self.size == 1:
            return Gathered(list(prompts), range(len(prompts)))
        shares = self._all([(prompt.token_ids, prompt.seed) for prompt in prompts])
        start = sum(map(len, shares[: distributed.get_rank(self._group)]))
        gathered = [Prompt(ids, "", seed=seed) for share in shares for ids, seed in share]
        return Gathered(gathered, range(start, start + len(prompts)))

    def check(self, groups: Sequence[list[Completion]], error: Exception | None) -> None:
        """Raise on all ranks of the engine if one has failed, or if they have sampled differently.

        Args:
            groups: all that the engine has sampled.
            error: of this rank.

        Raises:
            RuntimeError: another rank has failed, or has other tokens.
        """
        if self.size == 1:
            return
        tokens = hash(tuple(tuple(one.token_ids) for group in groups for one in group))
        found = self._all((tokens, error and f"{type(error).__name__}: {error}"))
        if error is not None:
            raise error
        first = distributed.get_global_rank(self._group, 0)
        for rank, (of_rank, failure) in enumerate(found, first):
            if failure:
                raise RuntimeError(f"rank {rank}, which shares this engine, failed: {failure}")
            if of_rank != found[0][0]:
                raise RuntimeError(
                    f"ranks {first} and {rank} share an engine, but have sampled different tokens. "
                    "Set rollout.sampler.tensor_parallel_size=1 if the model fits on one device."
                )

    def close(self) -> None:
        """Give up the connections to the other ranks."""
        if self._group is not None and distributed.is_initialized():
            distributed.destroy_process_group(self._group)
        self._group = None

    @contextmanager
    def environment(self) -> Iterator[dict[str, Any]]:
        """Let the engine start in the trainer's process group instead of opening a port.

        It reads its rank from the environment, which Lightning's launchers do not set completely.

        Yields:
            Arguments for the engine.
        """
        if not distributed.is_initialized():
            # vLLM creates process groups of this one process. Their transport (gloo) listens on a
            # port: bind it to loopback.
            loopback = "lo" if sys.platform == "linux" else "lo0"
            os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
            yield {}
            return
        device = torch.cuda.current_device() if torch.cuda.is_available() else local_rank()
        place = {
            "RANK": str(distributed.get_rank()),
            "LOCAL_RANK": str(device),
            "WORLD_SIZE": str(distributed.get_world_size()),
        }
        before = {name: os.environ[name] for name in place if name in os.environ}
        os.environ.update(place)
        try:
            yield {
                "distributed_executor_backend": "external_launcher",
                "tensor_parallel_size": self.size,
            }
        finally:
            for name in place:
                del os.environ[name]
            os.environ.update(before)

    def _all(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value, group=self._group)
        return values


def indivisible_ranks(size: int, ranks: int) -> str:
    """Return the error of an engine that needs more ranks, or leaves some over."""
    return (
        f"rollout.sampler.tensor_parallel_size={size}: each {size} ranks share an engine, but the "
        f"trainer has {ranks} (trainer.devices x num_nodes), which is no multiple of it. Change "
        "one of them."
    )
