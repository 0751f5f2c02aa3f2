"""RolloutLoader: an epoch's micro-batches in order, and what a checkpoint keeps of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from prl_lightning.data.rollouts import RolloutBuffer
from prl_lightning.types import Completion, Prompt, Rollout, RolloutBatch


class RolloutLoader:
    """Hand out the micro-batches of a buffer; stateful as torchdata's loaders are.

    Args:
        buffer: filled by the callback, after Lightning has asked for the iterator.
        rank: of this process.
        ranks: processes that share an update.
    """

    def __init__(self, buffer: RolloutBuffer, rank: int = 0, ranks: int = 1) -> None:
        self.buffer = buffer
        self.rank = rank
        self.ranks = ranks

    def __len__(self) -> int:
        """Micro-batches an epoch on this rank."""
        return len(self.buffer)

    def __iter__(self) -> Iterator[RolloutBatch]:
        """Go on at the buffer's position, looked up when an item is asked for."""
        while self.buffer.position < len(self.buffer):
            self.buffer.position += 1
            yield self.buffer[self.buffer.position - 1]

    def state_dict(self) -> dict[str, Any]:
        """Position and, while an epoch is under way, the rollouts of every rank.

        Called on all ranks; rank 0 has the rollouts, because it writes the checkpoint. An update
        that is under way is to begin again: its gradient is not kept.
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
        """Take this rank's share of every update, whatever the number of ranks was.

        Raises:
            ValueError: the updates of the epoch that is under way are cut otherwise than before.
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
        totals = [[sum(len(r.completion.token_ids) for r in all_), len(all_)] for all_ in updates]
        share = len(updates[0]) // self.ranks
        own = [r for all_ in updates for r in all_[self.rank * share : (self.rank + 1) * share]]
        self.buffer.fill(own, lambda _: torch.tensor(totals))
        self.buffer.position = state["position"]


def gather(value: Any, rank: int, ranks: int) -> list[Any] | None:
    """Every rank's value, in their order, on rank 0; None elsewhere.

    Args:
        value: of this rank.
        rank: of this process.
        ranks: how many there are; all of them call this.
    """
    if ranks == 1:
        return [value]
    values = [None] * ranks if rank == 0 else None
    torch.distributed.gather_object(value, values)
    return values


def _in_global_order(shares: list[list[Rollout]], updates: int) -> list[list[Rollout]]:
    """The rollouts of each update, rank by rank."""
    size = len(shares[0]) // updates
    return [
        [rollout for share in shares for rollout in share[index * size : (index + 1) * size]]
        for index in range(updates)
    ]


def pack(rollouts: Sequence[Rollout]) -> dict[str, Any]:
    """Rollouts as few tensors and lists, which a checkpoint may hold.

    Args:
        rollouts: rewarded; the columns of their prompts are done with and left out.
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
        "texts": [rollout.text for rollout in rollouts],
        "rewards": [rollout.reward for rollout in rollouts],
        "advantages": _join([rollout.outcome_advantage for rollout in rollouts]),
        "old_logprobs": _join([rollout.old_logprobs for rollout in rollouts]),
        "ref_logprobs": _join([rollout.ref_logprobs for rollout in rollouts]),
    }


def unpack(packed: dict[str, Any]) -> list[Rollout]:
    """Undo ``pack``.

    Args:
        packed: what it has returned.
    """
    ragged = {
        name: _split(packed[name], len(packed["texts"]))
        for name in ("prompt_ids", "completion_ids", "logprobs", "advantages", "old_logprobs",
                     "ref_logprobs")
    }  # fmt: skip
    return [
        Rollout(
            Prompt(ragged["prompt_ids"][row].tolist(), packed["sources"][row],
                   seed=packed["seeds"][row]),
            Completion(ragged["completion_ids"][row].tolist(), ragged["logprobs"][row].tolist(),
                       packed["finished"][row]),
            packed["texts"][row],
            packed["rewards"][row],
            ragged["advantages"][row],
            ragged["old_logprobs"][row],
            ragged["ref_logprobs"][row],
        )
        for row in range(len(packed["texts"]))
    ]  # fmt: skip


def _join(parts: list[Any]) -> dict[str, Any] | None:
    """One tensor instead of thousands: each would be an entry of the file."""
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
