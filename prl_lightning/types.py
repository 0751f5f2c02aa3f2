"""What flows from the prompts to the loss, and the shape letters used everywhere.

Shape letters: B completions, G group size, T completion tokens, S tokens of a whole row (prompt and
completion), V vocabulary, H hidden size.

Four log-probabilities that are never mixed, all natural logarithms at the sampling temperature:
``policy_logprobs`` (this update's policy, with gradient), ``old_logprobs`` (the policy that
sampled, as the trainer has it; with ``rollout.overlap``, where the trainer is an update further, as
the engine reported it), ``rollout_logprobs`` (what the engine reported) and ``ref_logprobs``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, dataclass_transform

import torch
from torch import Tensor

from prl_lightning.models.packing import Packing

Message = dict[str, str]


@dataclass(frozen=True)
class Prompt:
    """One problem, ready for the engine.

    Attributes:
        token_ids: the rendered prompt (system prompt, template and chat template applied).
        source: the prompt as the data has it, text or chat messages; reward functions get this.
        columns: every other column of its row; reward functions get these too.
        seed: its completions are drawn with the random numbers of seed, seed + 1 and so on. It
            depends on the prompt's place in the data alone, not on how many ranks share the
            prompts. Whether equal seeds give equal tokens: see ``Sampler.generate``.
        is_padding: a repeated prompt of an evaluation set that the ranks do not divide; it keeps
            them in step and is not counted.
    """

    token_ids: list[int]
    source: str | list[Message]
    columns: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    is_padding: bool = False


@dataclass(frozen=True)
class Completion:
    """One sampled completion, as an engine returns it.

    Attributes:
        token_ids: sampled tokens, the end-of-sequence token included.
        logprobs: the engine's log-probability of each of them.
        finished: it ended by itself; False where it was cut at the limit.
    """

    token_ids: list[int]
    logprobs: list[float]
    finished: bool


@dataclass
class Rollout:
    """One completion with all that is known of it before the update.

    Attributes:
        prompt: where it comes from.
        completion: what was sampled.
        text: the completion, decoded without special tokens.
        reward: weighted sum of the reward functions.
        outcome_advantage: scalar () or, for a reward with the KL inside it, one per token (T,).
        old_logprobs: (T,) or None where one update a rollout makes them equal to the policy's.
        ref_logprobs: (T,) or None where nothing needed them before the update.
        answer: the number of its answer in its group, the same for equal answers and below zero
            without one; None where no reward function can tell, and in training.
    """

    prompt: Prompt
    completion: Completion
    text: str
    reward: float = 0.0
    outcome_advantage: Tensor = field(default_factory=lambda: torch.zeros(()))
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    answer: int | None = None


@dataclass_transform(kw_only_default=True)
class _Fields:
    """A dataclass to people and type checkers, but not to Lightning.

    Under a precision such as bf16-true it would round every float tensor of a dataclass, and with
    them advantages and log-probabilities.
    """

    def __init__(self, **fields: Any) -> None:
        vars(self).update(fields)


class RolloutBatch(_Fields):
    """A micro-batch: what ``training_step`` and ``validation_step`` receive.

    Attributes:
        input_ids: (B, S) prompt directly followed by completion, padded on the right, so that a
            causal model needs no attention mask.
        prompt_lengths: (B,) tokens of each prompt.
        completion_ids: (B, T) the completion part of ``input_ids``.
        completion_mask: (B, T) bool, True on sampled tokens, the end-of-sequence token included.
        packing: the rows as one long row, see Packing.
        rollout_logprobs: (B, T).
        rewards: (B,).
        finished: (B,) bool, False where a completion was cut at the limit.
        outcome_advantages: (B,) or (B, T).
        old_logprobs: (B, T) or None, see Rollout.
        ref_logprobs: (B, T) or None, see Rollout.
        update_tokens: completion tokens of the whole optimizer update, over all micro-batches and
            ranks; the denominator that makes the loss independent of how the update was cut.
        update_sequences: completions of the whole update, likewise.
        answers: (B,) integers or None, see Rollout.
        is_padding: completions of a padding prompt, see Prompt.
    """

    input_ids: Tensor
    prompt_lengths: Tensor
    completion_ids: Tensor
    completion_mask: Tensor
    packing: Packing
    rollout_logprobs: Tensor
    rewards: Tensor
    finished: Tensor
    outcome_advantages: Tensor
    old_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    update_tokens: int
    update_sequences: int
    answers: Tensor | None = None
    is_padding: bool = False

    @property
    def num_tokens(self) -> int:
        """Completion tokens of this micro-batch."""
        return len(self.packing.targets)

    def to(self, device: torch.device | str) -> RolloutBatch:
        """Return the batch on ``device`` (the method that Lightning's transfer calls)."""

        def move(tensor: Tensor) -> Tensor:
            if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
                # Out of other memory a copy waits for all that the GPU has to do.
                return tensor.pin_memory().to(device, non_blocking=True)
            return tensor.to(device)

        moved: dict[str, Any] = {
            name: move(value) if isinstance(value, Tensor) else value
            for name, value in vars(self).items()
        }
        return RolloutBatch(**moved | {"packing": self.packing.map(move)})
