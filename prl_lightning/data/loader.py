"""RolloutLoader: an epoch's micro-batches in order, and their state in a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from prl_lightning.data.rollouts import RolloutBuffer
from prl_lightning.distributed import gather
from prl_lightning.types import Completion, Prompt, Rollout, RolloutBatch


class RolloutLoader:
    """Iterate over the micro-batches of a buffer; stateful like torchdata's loaders.

    Args:
        buffer: the callback fills it after Lightning has created the iterator.
        rank: of this process.
        ranks: number of processes that share an update.
    """

    def __init__(self, buffer: RolloutBuffer, rank: int = 0, ranks: int = 1) -> None:
        self.buffer = buffer
        self.rank = rank
        self.ranks = ranks

    def __len__(self) -> int:
        """Return the number of micro-batches per epoch on this rank."""
        return len(self.buffer)

    def __iter__(self) -> Iterator[RolloutBatch]:
        """Continue at the buffer's position, which is read for every item."""
        while self.buffer.position < len(self.buffer):
            self.buffer.position += 1
            yield self.buffer[self.buffer.position - 1]

    def state_dict(self) -> dict[str, Any]:
        """Return the position and, within an epoch, the rollouts of every rank; a collective.

        Only rank 0 gets the rollouts, because it writes the checkpoint. The position is that of the
        start of the current update: its partial gradient is not saved.
        """
        size = self.buffer.micro_batches
        state: dict[str, Any] = {
            "position": self.buffer.position // size * size,
            "updates": self.buffer.num_updates,
            "micro_batches": size,
        }
        if self.buffer.rollouts and self.buffer.position < len(self.buffer):
            state["shares"] = gather(pack(self.buffer.rollouts), self.rank, self.ranks)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take this rank's share of every update, for any earlier number of ranks.

        Raises:
            ValueError: the number of updates or micro-batches of the unfinished epoch has changed.
        """
        if "shares" not in state:
            return
        for name, saved, now in (
            ("data.updates_per_epoch", state["updates"], self.buffer.num_updates),
            ("trainer.accumulate_grad_batches", state["micro_batches"], self.buffer.micro_batches),
        ):
            if saved != now:
                raise ValueError(
                    f"{name}={now}, but the checkpoint is from the middle of an epoch with {saved}."
                    " Set it back, or continue from a checkpoint of the end of an epoch."
                )
        updates = _in_global_order([unpack(share) for share in state["shares"]], state["updates"])
        totals = [[sum(r.completion.num_sampled for r in all_), len(all_)] for all_ in updates]
        share = len(updates[0]) // self.ranks
        own = [r for all_ in updates for r in all_[self.rank * share : (self.rank + 1) * share]]
        self.buffer.fill(own, lambda _: torch.tensor(totals))
        self.buffer.position = state["position"]


def _in_global_order(shares: list[list[Rollout]], updates: int) -> list[list[Rollout]]:
    """Return the rollouts of each update, rank by rank."""
    size = len(shares[0]) // updates
    return [
        [rollout for share in shares for rollout in share[index * size : (index + 1) * size]]
        for index in range(updates)
    ]


def pack(rollouts: Sequence[Rollout]) -> dict[str, Any]:
    """Turn rollouts into a few tensors and lists, which a checkpoint can hold.

    Args:
        rollouts: ready to train on. The columns of their prompts are dropped: only reward functions
            read them.
    """
    prompts = [rollout.prompt for rollout in rollouts]
    completions = [rollout.completion for rollout in rollouts]
    float64 = torch.float64  # Python's
    return {
        "prompt_ids": _join([torch.tensor(prompt.token_ids) for prompt in prompts]),
        "sources": [prompt.source for prompt in prompts],
        "seeds": [prompt.seed for prompt in prompts],
        "completion_ids": _join([torch.tensor(c.token_ids) for c in completions]),
        "logprobs": _join([torch.tensor(c.logprobs, dtype=float64) for c in completions]),
        "finished": [completion.finished for completion in completions],
        "is_sampled": _join([torch.tensor(c.is_sampled) for c in completions]),
        "texts": [rollout.text for rollout in rollouts],
        "temperatures": [rollout.temperature for rollout in rollouts],
        "rewards": [rollout.reward for rollout in rollouts],
        "advantages": _join([rollout.outcome_advantage for rollout in rollouts]),
        "old_logprobs": _join([rollout.old_logprobs for rollout in rollouts]),
        "ref_logprobs": _join([rollout.ref_logprobs for rollout in rollouts]),
    }


def unpack(packed: dict[str, Any]) -> list[Rollout]:
    """Undo ``pack``."""
    ragged = {
        name: _split(packed[name], len(packed["texts"]))
        for name in ("prompt_ids", "completion_ids", "logprobs", "is_sampled", "advantages",
                     "old_logprobs", "ref_logprobs")
    }  # fmt: skip
    return [
        Rollout(
            Prompt(ragged["prompt_ids"][row].tolist(), packed["sources"][row],
                   seed=packed["seeds"][row]),
            Completion(ragged["completion_ids"][row].tolist(), ragged["logprobs"][row].tolist(),
                       packed["finished"][row], ragged["is_sampled"][row].tolist()),
            packed["texts"][row],
            packed["temperatures"][row],
            packed["rewards"][row],
            ragged["advantages"][row],
            ragged["old_logprobs"][row],
            ragged["ref_logprobs"][row],
        )
        for row in range(len(packed["texts"]))
    ]  # fmt: skip


def _join(parts: list[Any]) -> dict[str, Any] | None:
    """Concatenate: each tensor on its own would be an entry of the checkpoint file."""
    if parts[0] is None:
        return None
    values = torch.cat([part.reshape(-1) for part in parts])
    return {"values": values, "shapes": [list(part.shape) for part in parts]}


def _split(joined: dict[str, Any] | None, count: int) -> list[Any]:
    if joined is None:
        return [None] * count
    sizes = [math.prod(shape) for shape in joined["shapes"]]
    parts: tuple[Tensor, ...] = joined["values"].split(sizes)
    return [part.view(shape) for part, shape in zip(parts, joined["shapes"], strict=True)]
