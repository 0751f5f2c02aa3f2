"""RolloutBuffer: an epoch's rollouts, cut into micro-batches."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from prl_lightning.distributed import max_over_ranks, sum_over_ranks
from prl_lightning.models.packing import Packing
from prl_lightning.types import Rollout, RolloutBatch

T = TypeVar("T")


def equal_parts(items: Sequence[T], parts: int) -> list[Sequence[T]]:
    """Cut a sequence into parts of the same length, in order."""
    size = len(items) // parts
    return [items[i * size : (i + 1) * size] for i in range(parts)]


def share_of(items: Sequence[T], updates: int, ranks: int) -> list[list[T]]:
    """Return each rank's share of every update, in order."""
    by_update = [equal_parts(update, ranks) for update in equal_parts(items, updates)]
    return [[item for shares in by_update for item in shares[rank]] for rank in range(ranks)]


def _cut(rollouts: Sequence[Rollout], limit: int) -> list[list[Rollout]]:
    """Cut rollouts before each that would make a micro-batch longer than ``limit`` tokens."""
    chunks: list[list[Rollout]] = []
    size = 0
    for rollout in rollouts:
        prompt, own = len(rollout.prompt.token_ids), rollout.completion.length
        # Equal, not identical: rollouts from a checkpoint do not share a prompt object.
        has_prompt = chunks and chunks[-1][-1].prompt == rollout.prompt
        size += own if has_prompt else prompt + own
        if not chunks or size > limit:
            chunks.append([])
            size = prompt + own
        chunks[-1].append(rollout)
    return chunks


def split_by_tokens(rollouts: Sequence[Rollout], parts: int) -> list[list[Rollout]]:
    """Cut rollouts into ``parts`` micro-batches of balanced size.

    The order is kept, so that a group stays together and its prompt is computed once. The largest
    micro-batch decides the peak memory, so it has as few tokens as the order allows.

    Args:
        rollouts: groups contiguous.
        parts: number of micro-batches, at most ``len(rollouts)``.

    Returns:
        The rollouts of each micro-batch, at least one in each.
    """
    longest = max(len(r.prompt.token_ids) + r.completion.length for r in rollouts)
    limits = range(longest, longest * len(rollouts) + 1)
    smallest = bisect_left(limits, True, key=lambda limit: len(_cut(rollouts, limit)) <= parts)
    chunks = _cut(rollouts, limits[smallest])
    while len(chunks) < parts:
        largest = max(range(len(chunks)), key=lambda i: len(chunks[i]))
        half = len(chunks[largest]) // 2
        chunks[largest : largest + 1] = [chunks[largest][:half], chunks[largest][half:]]
    return chunks


@dataclass(frozen=True)
class MicroBatches:
    """How rollouts are cut into micro-batches of balanced size.

    Attributes:
        most: number of micro-batches, on this rank.
        tokens: cut into fewer while none has more tokens than this, a group's prompt counted once.
    """

    most: int
    tokens: int | None = None

    def cut(self, rollouts: Sequence[Rollout]) -> list[list[Rollout]]:
        """Return the rollouts of each micro-batch, as many on every rank; a collective.

        Under a strategy that shards, every forward pass is a collective.
        """
        if self.tokens is None:
            return split_by_tokens(rollouts, self.most)
        needed = max_over_ranks(len(_cut(rollouts, self.tokens)))
        if needed > self.most:
            rank_zero_warn(
                f"Micro-batches have more than data.micro_batch_tokens={self.tokens} tokens: that "
                f"would take {needed} of them, and trainer.accumulate_grad_batches allows "
                f"{self.most}. Raise it, if the memory is needed."
            )
        return split_by_tokens(rollouts, min(needed, self.most))


def totals_of(rollouts: Iterable[Rollout]) -> list[int]:
    """Count the sampled tokens and the completions that the loss is computed from."""
    lengths = [rollout.completion.num_sampled for rollout in rollouts if rollout.in_loss]
    return [sum(lengths), len(lengths)]


def _for_loss(rollout: Rollout) -> Rollout:
    """Return a rollout whose tokens are all context if it is left out of the loss."""
    if rollout.in_loss:
        return rollout
    is_sampled = [False] * rollout.completion.length
    return replace(rollout, completion=replace(rollout.completion, is_sampled=is_sampled))


def collate(rollouts: Sequence[Rollout], update_tokens: int, update_sequences: int) -> RolloutBatch:
    """Pad rollouts into one batch.

    Args:
        rollouts: B rollouts, sampled at one temperature.
        update_tokens: sampled tokens of the whole optimizer update.
        update_sequences: completions of the whole update.

    Returns:
        A batch on the CPU; see RolloutBatch for shapes.
    """
    own = [rollout.completion for rollout in rollouts]
    prompts = [torch.tensor(rollout.prompt.token_ids) for rollout in rollouts]
    completions = [torch.tensor(completion.token_ids) for completion in own]
    is_sampled = [torch.tensor(completion.is_sampled) for completion in own]
    advantages = [rollout.outcome_advantage for rollout in rollouts]
    answers = [rollout.answer for rollout in rollouts]
    return RolloutBatch(
        input_ids=_pad([torch.cat(row) for row in zip(prompts, completions, strict=True)]),
        prompt_lengths=torch.tensor([len(ids) for ids in prompts]),
        completion_ids=_pad(completions),
        completion_lengths=torch.tensor([completion.length for completion in own]),
        completion_mask=_pad(is_sampled),
        packing=Packing(prompts, completions, is_sampled),
        temperature=rollouts[0].temperature,
        rollout_logprobs=_pad([torch.tensor(completion.logprobs) for completion in own]),
        rewards=torch.tensor([rollout.reward for rollout in rollouts]),
        finished=torch.tensor([completion.finished for completion in own]),
        outcome_advantages=_pad(advantages) if advantages[0].ndim else torch.stack(advantages),
        old_logprobs=_pad_if_known([rollout.old_logprobs for rollout in rollouts]),
        ref_logprobs=_pad_if_known([rollout.ref_logprobs for rollout in rollouts]),
        update_tokens=update_tokens,
        update_sequences=update_sequences,
        answers=None if None in answers else torch.tensor(answers),
        is_padding=all(rollout.prompt.is_padding for rollout in rollouts),
    )


def _pad(rows: Sequence[Tensor]) -> Tensor:
    return pad_sequence(list(rows), batch_first=True)


def _pad_if_known(rows: Sequence[Tensor | None]) -> Tensor | None:
    known = [row for row in rows if row is not None]
    return _pad(known) if len(known) == len(rows) else None


class RolloutBuffer:
    """An epoch's rollouts as micro-batches, replaced each epoch.

    The length is known before the buffer is filled: Lightning prefetches from a loader without a
    length before ``on_train_epoch_start``, so the first micro-batch would be stale.

    Args:
        num_updates: optimizer updates per epoch, or prompts of an evaluation set.
        micro_batches: micro-batches per update on this rank.
        micro_batch_tokens: see MicroBatches; the rest of an update's micro-batches are empty.

    Attributes:
        position: number of micro-batches read since the last fill.
    """

    def __init__(
        self, num_updates: int, micro_batches: int = 1, micro_batch_tokens: int | None = None
    ) -> None:
        self.num_updates = num_updates
        self.micro_batches = MicroBatches(micro_batches, micro_batch_tokens)
        self.rollouts: Sequence[Rollout] = []
        self.micro_batch_rollouts: list[list[Rollout]] = []
        self.position = 0
        self._totals = torch.zeros(num_updates, 2, dtype=torch.long)

    def fill(self, rollouts: Sequence[Rollout], totals: Tensor | None = None) -> None:
        """Replace the contents; a collective.

        Args:
            rollouts: of this rank, ready to train on, the same number for each update.
            totals: (num_updates, 2), ``totals_of`` each update on all ranks.
        """
        updates = equal_parts(rollouts, self.num_updates)
        parts = [self._padded(self.micro_batches.cut(update)) for update in updates]
        if totals is None:
            totals = sum_over_ranks(torch.tensor([totals_of(update) for update in updates]))
        self.rollouts = rollouts
        self.micro_batch_rollouts = [chunk for chunks in parts for chunk in chunks]
        self.position = 0
        self._totals = totals

    def _padded(self, chunks: list[list[Rollout]]) -> list[list[Rollout]]:
        """Add empty micro-batches in front: Lightning steps after the last one."""
        return [[] for _ in range(self.micro_batches.most - len(chunks))] + chunks

    def metrics(self) -> dict[str, float]:
        """Return the mean number of micro-batches of an update, if it depends on their tokens."""
        if self.micro_batches.tokens is None:
            return {}
        return {"micro_batches": sum(map(bool, self.micro_batch_rollouts)) / self.num_updates}

    def __len__(self) -> int:
        """Return the number of micro-batches per epoch on this rank, the empty ones included."""
        return self.num_updates * self.micro_batches.most

    def __getitem__(self, index: int) -> RolloutBatch | None:
        """Return micro-batch ``index``; an update takes ``micro_batches`` consecutive ones.

        An empty one is None, which Lightning skips.

        Raises:
            RuntimeError: the buffer is not filled yet.
        """
        if not self.micro_batch_rollouts:
            raise RuntimeError(
                "the rollout buffer is empty: add prl_lightning.callbacks.RolloutCallback to the "
                "Trainer's callbacks"
            )
        rollouts = self.micro_batch_rollouts[index]
        if not rollouts:
            return None
        tokens, sequences = self._totals[index // self.micro_batches.most].tolist()
        return collate([_for_loss(r) for r in rollouts], tokens, sequences)
