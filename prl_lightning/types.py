"""What flows from the prompts to the loss, and the shape letters used everywhere.

Shape letters: B completions, G group size, T completion tokens, S tokens of a whole row (prompt and
completion), V vocabulary, H hidden size.

Four log-probabilities that are never mixed, all natural logarithms at the sampling temperature:
``policy_logprobs`` (the policy of this update, with gradient), ``old_logprobs`` (the policy that
sampled, as the trainer computes it; with ``rollout.overlap``, where the trainer is some updates
ahead, as the engine reported it), ``rollout_logprobs`` (as the engine reported it) and
``ref_logprobs`` (the reference).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, dataclass_transform

import torch
from torch import Tensor

from prl_lightning.models.packing import Packing

Message = dict[str, Any]


@dataclass(frozen=True)
class Prompt:
    """One problem, ready for the engine.

    Attributes:
        token_ids: the rendered prompt (system prompt, template and chat template applied).
        source: the prompt as it stands in the data, text or chat messages, for reward functions.
        columns: every other column of its source, for reward functions; None where its row has no
            value.
        seed: its completions use the random numbers of seed, seed + 1 and so on. It depends only on
            the prompt's position in the data, not on the number of ranks. Whether equal seeds give
            equal tokens: see ``Sampler.generate``.
        position: of a training prompt in the endless stream of the data.
        is_padding: a repeated prompt that fills up an evaluation set whose size the number of ranks
            does not divide; it is not counted.
    """

    token_ids: list[int]
    source: str | list[Message]
    columns: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    position: int = 0
    is_padding: bool = False


@dataclass(frozen=True)
class Completion:
    """One completion, as an engine returns it.

    Attributes:
        token_ids: its tokens, the end-of-sequence token included.
        logprobs: the engine's log-probability of each token; ignored where it was not sampled.
        finished: True if it ended with a stop token, False if it was cut at the limit.
        is_sampled: which tokens the policy sampled. The others, such as the output of a tool, are
            context: they are not trained on. By default all are sampled.
        messages: of an episode with an environment or tools, its turns and results as chat
            messages, for reward functions.
        environment_reward: what the environment's ``get_reward`` returned.
        call_errors: number of calls that returned an error to the model.
        failure: why the environment failed; empty if it did not.
    """

    token_ids: list[int]
    logprobs: list[float]
    finished: bool
    is_sampled: list[bool] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    environment_reward: float | None = None
    call_errors: int = 0
    failure: str = ""

    def __post_init__(self) -> None:
        """Without a mask, mark every token as sampled."""
        if not self.is_sampled:
            object.__setattr__(self, "is_sampled", [True] * len(self.token_ids))

    @property
    def length(self) -> int:
        """Number of tokens, sampled or not."""
        return len(self.token_ids)

    @property
    def num_sampled(self) -> int:
        """Number of sampled tokens."""
        return sum(self.is_sampled)


@dataclass
class Rollout:
    """One completion with everything the update needs.

    Attributes:
        prompt: the prompt.
        completion: its tokens.
        text: the completion, decoded without special tokens.
        temperature: of the sampling; its log-probabilities are computed at it, too.
        reward: weighted sum of the reward functions.
        reward_parts: weight and reward of each function; NaN where it does not apply.
        outcome_advantage: scalar (), or (T,) if the KL is part of the reward.
        in_loss: False if it was cut at the limit and ``objective.mask_truncated`` leaves it out.
        old_logprobs: (T,); None if the policy that is updated is the one that sampled.
        ref_logprobs: (T, K) of K references; None if nothing needed them before the update.
        answer: id of its answer within the group: equal for equal answers, negative without an
            answer. None in training, and if no reward function compares answers.
    """

    prompt: Prompt
    completion: Completion
    text: str
    temperature: float = 1.0
    reward: float = 0.0
    reward_parts: list[tuple[float, float]] = field(default_factory=list)
    outcome_advantage: Tensor = field(default_factory=lambda: torch.zeros(()))
    in_loss: bool = True
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    answer: int | None = None


class PromptSource(ABC):
    """Rows that are made on demand, for ``data.train`` and ``evaluation.sets``.

    A subclass is named in a configuration by its ``class_path``. It needs two methods:

        class Squares(PromptSource):
            def __len__(self):
                return 1000

            def row(self, position, attempt):
                number = random.Random(f"{position} {attempt}").randrange(10**6)
                return {"prompt": f"What is {number} squared?", "answer": number**2}
    """

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of rows of an evaluation set, or of a pass over the training data."""

    @abstractmethod
    def row(self, position: int, attempt: int) -> dict[str, Any]:
        """Return the row of a position: ``prompt``, and columns for the reward functions.

        It depends on nothing but the arguments, the settings and ``state_dict``, so that a resumed
        run and every rank read the same rows. Two rows with the same ``question`` (by default, the
        same prompt) are the same problem.

        Args:
            position: at least 0 and below the length.
            attempt: how many rows of this position were refused. In an evaluation set a problem is
                refused if an earlier position has it, in training if an evaluation set has it.
        """

    def check(self) -> None:  # noqa: B027  (optional)
        """Check the settings before anything is loaded; a ValueError or OSError has the message."""

    def observe(self, rollouts: Sequence[Rollout]) -> dict[str, float]:
        """Take in the rewards of an iteration; a collective.

        Args:
            rollouts: this rank's, of all sources; with ``rollout.refill`` also of the groups
                without signal that are not trained on.

        Returns:
            Values to log, as ``rollout/NAME``.
        """
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return what ``observe`` has changed, for a checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027  (optional)
        """Continue from a checkpoint."""


@dataclass_transform(kw_only_default=True)
class _Fields:
    """A dataclass for people and type checkers, but not for Lightning.

    Under a precision such as bf16-true Lightning rounds every float tensor of a dataclass, which
    would include advantages and log-probabilities.
    """

    def __init__(self, **fields: Any) -> None:
        vars(self).update(fields)


class RolloutBatch(_Fields):
    """A micro-batch: the input of ``training_step`` and ``validation_step``.

    Attributes:
        input_ids: (B, S) prompt directly followed by completion, padded on the right, so that a
            causal model needs no attention mask.
        prompt_lengths: (B,) tokens of each prompt.
        completion_ids: (B, T) the completion part of ``input_ids``.
        completion_lengths: (B,) tokens of each completion, sampled or not.
        completion_mask: (B, T) bool, True on sampled tokens, the end-of-sequence token included;
            nowhere True in a completion that is left out of the loss.
        packing: the rows as one long row, see Packing.
        temperature: at which the completions were sampled.
        rollout_logprobs: (B, T).
        rewards: (B,).
        finished: (B,) bool, False if a completion was cut at the limit.
        outcome_advantages: (B,) or (B, T).
        old_logprobs: (B, T) or None, see Rollout.
        ref_logprobs: (B, T, K) or None, see Rollout.
        update_tokens: sampled tokens of the whole optimizer update, over all micro-batches and
            ranks; this denominator makes the loss independent of how the update was cut.
        update_sequences: completions of the whole update. Neither counts those that are left out
            of the loss.
        answers: (B,) integers or None, see Rollout.
        is_padding: the completions belong to a padding prompt, see Prompt.
    """

    input_ids: Tensor
    prompt_lengths: Tensor
    completion_ids: Tensor
    completion_lengths: Tensor
    completion_mask: Tensor
    packing: Packing
    temperature: float
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
        """Sampled tokens of this micro-batch."""
        return len(self.packing.targets)

    def to(self, device: torch.device | str) -> RolloutBatch:
        """Return a copy on ``device``; Lightning's batch transfer calls this."""

        def move(tensor: Tensor) -> Tensor:
            if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
                # A copy from pageable memory would wait until the GPU is idle.
                return tensor.pin_memory().to(device, non_blocking=True)
            return tensor.to(device)

        moved: dict[str, Any] = {
            name: move(value) if isinstance(value, Tensor) else value
            for name, value in vars(self).items()
        }
        return RolloutBatch(**moved | {"packing": self.packing.map(move)})
