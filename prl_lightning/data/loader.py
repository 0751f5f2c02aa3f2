"""RolloutLoader: an epoch's micro-batches in order, and their state in a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from prl_lightning.data.rollouts import RolloutBuffer, equal_parts, totals_of
from prl_lightning.distributed import gather
from prl_lightning.types import Completion, Prompt, Rollout, RolloutBatch

# Fields of a Rollout that a checkpoint keeps, besides its prompt and completion.
OF_ROLLOUT = (
    "text", "temperature", "reward", "outcome_advantage", "in_loss", "old_logprobs", "ref_logprobs",
)  # fmt: skip


class RolloutLoader:
    """Iterate over the micro-batches of a buffer; stateful like torchdata's loaders.

    Args:
        buffer: filled by the callback after Lightning has created the iterator.
        rank: index of this process.
        ranks: number of processes that share an update.
    """

    def __init__(self, buffer: RolloutBuffer, rank: int = 0, ranks: int = 1) -> None:
        self.buffer = buffer
        self.rank = rank
        self.ranks = ranks

    def __len__(self) -> int:
        """Return the number of micro-batches per epoch on this rank."""
        return len(self.buffer)

    def __iter__(self) -> Iterator[RolloutBatch | None]:
        """Yield from the buffer's position, which a fill may reset between two items."""
        while self.buffer.position < len(self.buffer):
            self.buffer.position += 1
            yield self.buffer[self.buffer.position - 1]

    def state_dict(self) -> dict[str, Any]:
        """Return the position and, within an epoch, the rollouts of all ranks; a collective.

        Only rank 0 gets the rollouts, because it writes the checkpoint. The position is rounded
        down to the start of the current update, because its partial gradient is not saved.
        """
        size = self.buffer.micro_batches.most
        state: dict[str, Any] = {
            "position": self.buffer.position // size * size,
            "updates": self.buffer.num_updates,
            "micro_batches": size,
        }
        if self.buffer.rollouts and self.buffer.position < len(self.buffer):
            state["shares"] = gather(pack(self.buffer.rollouts))
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load this rank's share of every update; the number of ranks may have changed.

        Raises:
            ValueError: the number of updates or of micro-batches per update has changed.
        """
        if "shares" not in state:
            return
        micro_batches = self.buffer.micro_batches.most
        for name, saved, now in (
            ("data.updates_per_epoch", state["updates"], self.buffer.num_updates),
            ("trainer.accumulate_grad_batches", state["micro_batches"], micro_batches),
        ):
            if saved != now:
                raise ValueError(
                    f"{name}={now}, but the checkpoint is from the middle of an epoch with {saved}."
                    " Set it back, or continue from a checkpoint of the end of an epoch."
                )
        by_rank = [equal_parts(unpack(share), state["updates"]) for share in state["shares"]]
        updates = [list(chain(*parts)) for parts in zip(*by_rank, strict=True)]
        totals = [totals_of(update) for update in updates]
        own = [r for all_ in updates for r in equal_parts(all_, self.ranks)[self.rank]]
        self.buffer.fill(own, torch.tensor(totals))
        self.buffer.position = state["position"]


def pack(rollouts: Sequence[Rollout]) -> dict[str, Any]:
    """Turn rollouts into a few tensors and lists, which a checkpoint can hold.

    Args:
        rollouts: ready to train on. The columns of their prompts are dropped: only reward functions
            read them.
    """
    prompts = [rollout.prompt for rollout in rollouts]
    completions = [rollout.completion for rollout in rollouts]
    columns: dict[str, list[Any]] = {
        "prompt_ids": [torch.tensor(prompt.token_ids) for prompt in prompts],
        "source": [prompt.source for prompt in prompts],
        "seed": [prompt.seed for prompt in prompts],
        "completion_ids": [torch.tensor(c.token_ids) for c in completions],
        # Python's floats are float64, and a resumed run must be exact.
        "logprobs": [torch.tensor(c.logprobs, dtype=torch.float64) for c in completions],
        "finished": [completion.finished for completion in completions],
        "is_sampled": [torch.tensor(c.is_sampled) for c in completions],
        **{name: [getattr(rollout, name) for rollout in rollouts] for name in OF_ROLLOUT},
    }
    return {
        name: _join(values) if isinstance(values[0], Tensor) else values
        for name, values in columns.items()
    }


def unpack(packed: dict[str, Any]) -> list[Rollout]:
    """Undo ``pack``."""
    columns = [value if isinstance(value, list) else _split(**value) for value in packed.values()]
    rollouts = []
    for values in zip(*columns, strict=True):
        row = dict(zip(packed, values, strict=True))
        ids, logprobs, is_sampled = (
            row[name].tolist() for name in ("completion_ids", "logprobs", "is_sampled")
        )
        prompt = Prompt(row["prompt_ids"].tolist(), row["source"], seed=row["seed"])
        completion = Completion(ids, logprobs, row["finished"], is_sampled)
        rollouts.append(Rollout(prompt, completion, **{name: row[name] for name in OF_ROLLOUT}))
    return rollouts


def _join(parts: list[Tensor]) -> dict[str, Any]:
    """Concatenate: each tensor alone would be a separate entry of the checkpoint file."""
    values = torch.cat([part.reshape(-1) for part in parts])
    return {"values": values, "shapes": [list(part.shape) for part in parts]}


def _split(values: Tensor, shapes: list[list[int]]) -> list[Tensor]:
    parts = torch.split(values, [math.prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
