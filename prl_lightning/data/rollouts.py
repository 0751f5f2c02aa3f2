"""RolloutBuffer: an epoch's rollouts, cut into micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from prl_lightning.models.packing import Packing
from prl_lightning.types import Rollout, RolloutBatch


def split_by_tokens(rollouts: Sequence[Rollout], parts: int) -> list[list[Rollout]]:
    """Cut rollouts into exactly ``parts`` micro-batches of balanced size.

    The order is kept, so that a group stays together and its prompt is computed once. The largest
    micro-batch has as few tokens as the order allows, because it decides the peak memory.

    Args:
        rollouts: groups one after the other.
        parts: number of micro-batches, at most ``len(rollouts)``.

    Returns:
        The rollouts of each micro-batch, none of them empty.
    """

    def cut(limit: int) -> list[list[Rollout]]:
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

    low = max(len(r.prompt.token_ids) + r.completion.length for r in rollouts)
    high = low * len(rollouts)
    while low < high:
        middle = (low + high) // 2
        if len(cut(middle)) <= parts:
            high = middle
        else:
            low = middle + 1
    chunks = cut(high)
    while len(chunks) < parts:
        largest = max(range(len(chunks)), key=lambda i: len(chunks[i]))
        chunk = chunks[largest]
        half = len(chunk) // 2
        chunks[largest : largest + 1] = [chunk[:half], chunk[half:]]
    return chunks


def collate(rollouts: Sequence[Rollout], update_tokens: int, update_sequences: int) -> RolloutBatch:
    """Pad rollouts into one batch.

    Args:
        rollouts: B of them, sampled at one temperature.
        update_tokens: sampled tokens of the update they belong to.
        update_sequences: completions of that update.

    Returns:
        A batch on the CPU; see RolloutBatch for shapes.
    """
    prompts = [torch.tensor(rollout.prompt.token_ids) for rollout in rollouts]
    completions = [torch.tensor(rollout.completion.token_ids) for rollout in rollouts]
    is_sampled = [torch.tensor(rollout.completion.is_sampled) for rollout in rollouts]
    rows = [torch.cat(pair) for pair in zip(prompts, completions, strict=True)]
    advantages = [rollout.outcome_advantage for rollout in rollouts]
    return RolloutBatch(
        input_ids=_pad(rows),
        prompt_lengths=torch.tensor([len(ids) for ids in prompts]),
        completion_ids=_pad(completions),
        completion_lengths=torch.tensor([rollout.completion.length for rollout in rollouts]),
        completion_mask=_pad(is_sampled),
        packing=Packing(prompts, completions, is_sampled),
        temperature=rollouts[0].temperature,
        rollout_logprobs=_pad([torch.tensor(r.completion.logprobs) for r in rollouts]),
        rewards=torch.tensor([rollout.reward for rollout in rollouts]),
        finished=torch.tensor([rollout.completion.finished for rollout in rollouts]),
        outcome_advantages=_pad(advantages) if advantages[0].ndim else torch.stack(advantages),
        old_logprobs=_pad_if_known([rollout.old_logprobs for rollout in rollouts]),
        ref_logprobs=_pad_if_known([rollout.ref_logprobs for rollout in rollouts]),
        update_tokens=update_tokens,
        update_sequences=update_sequences,
        answers=_numbers_if_known([rollout.answer for rollout in rollouts]),
        is_padding=all(rollout.prompt.is_padding for rollout in rollouts),
    )


def _pad(rows: Sequence[Tensor]) -> Tensor:
    return pad_sequence(list(rows), batch_first=True)


def _pad_if_known(rows: Sequence[Tensor | None]) -> Tensor | None:
    known = [row for row in rows if row is not None]
    return _pad(known) if len(known) == len(rows) else None


def _numbers_if_known(answers: Sequence[int | None]) -> Tensor | None:
    known = [answer for answer in answers if answer is not None]
    return torch.tensor(known) if len(known) == len(answers) else None


class RolloutBuffer:
    """An epoch's rollouts as micro-batches, replaced each epoch.

    Its length is fixed before it is filled. Lightning reads a loader without a length ahead of
    ``on_train_epoch_start``, which would make the first micro-batch stale.

    Args:
        num_updates: optimizer updates per epoch; for evaluation, prompts.
        micro_batches: micro-batches per update on this rank.

    Attributes:
        position: micro-batches handed out since the last fill.
    """

    def __init__(self, num_updates: int, micro_batches: int = 1) -> None:
        self.num_updates = num_updates
        self.micro_batches = micro_batches
        self.rollouts: Sequence[Rollout] = []
        self.micro_batch_rollouts: list[list[Rollout]] = []
        self.position = 0
        self._totals = torch.zeros(num_updates, 2, dtype=torch.long)

    def fill(
        self,
        rollouts: Sequence[Rollout],
        sum_over_ranks: Callable[[Tensor], Tensor] = lambda totals: totals,
    ) -> None:
        """Replace the contents.

        Args:
            rollouts: of this rank, ready to train on, the same number for each update.
            sum_over_ranks: adds up the (num_updates, 2) tokens and sequences of all ranks.
        """
        size = len(rollouts) // self.num_updates
        self.rollouts = rollouts
        self.micro_batch_rollouts = []
        self.position = 0
        totals = []
        for index in range(self.num_updates):
            update = rollouts[index * size : (index + 1) * size]
            totals.append([sum(r.completion.num_sampled for r in update), size])
            self.micro_batch_rollouts += split_by_tokens(update, self.micro_batches)
        self._totals = sum_over_ranks(torch.tensor(totals))

    def __len__(self) -> int:
        """Return the number of micro-batches per epoch on this rank."""
        return self.num_updates * self.micro_batches

    def __getitem__(self, index: int) -> RolloutBatch:
        """Return micro-batch ``index``; an update takes ``micro_batches`` consecutive ones.

        Raises:
            RuntimeError: the buffer was not filled yet.
        """
        if not self.micro_batch_rollouts:
            raise RuntimeError(
                "the rollout buffer is empty: add prl_lightning.callbacks.RolloutCallback to the "
                "Trainer's callbacks"
            )
        tokens, sequences = self._totals[index // self.micro_batches].tolist()
        return collate(self.micro_batch_rollouts[index], tokens, sequences)
