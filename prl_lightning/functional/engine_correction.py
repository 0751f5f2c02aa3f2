"""Importance weights between the engine that samples and the trainer."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from prl_lightning.functional.masks import MAX_LOG_RATIO, keep_tokens
from prl_lightning.functional.registry import Registry

FIELD = "model.objective.engine_correction"
Outside = Literal["truncate", "mask"]


@dataclass(frozen=True)
class EngineCorrection:
    """Weight each token's loss by w = π_old/π_rollout, within bounds.

    The engine that samples and the trainer compute slightly different probabilities from the same
    weights. w corrects the expectation; the bounds limit its variance.

    | level | w of a token |
    | --- | --- |
    | token | π_old/π_rollout of the token |
    | sequence | the product over the completion's sampled tokens |
    | sequence_mean | their geometric mean, which does not grow with the length |

    | outside | weight | source |
    | --- | --- | --- |
    | truncate | w, but not below low or above high | Ionides 2008; verl's rollout correction |
    | mask | w, but 0 below low or above high | IcePop, arXiv 2510.18855, Eq. 1 and 2 |

    IcePop is the level token with the bounds 0.5 and 5 (its section 2.3.4).

    Only the product makes the expectation exact, and only without bounds. A masked token still
    counts in the totals that the loss is divided by.

    Attributes:
        level: a name of the first table.
        outside: what happens to a weight outside the bounds, a name of the second table.
        low: smallest weight, between 0 and 1.
        high: largest weight, at least 1; infinite for none.
    """

    level: str = "token"
    outside: Outside = "truncate"
    low: float = 0.0
    high: float = 2.0

    def __post_init__(self) -> None:
        """Check the values."""
        errors = [LEVELS.error(self.level, f"{FIELD}.level")]
        for name, fits, wanted in (
            ("outside", self.outside in get_args(Outside), f"use one of {get_args(Outside)}"),
            ("low", 0 <= self.low <= 1, "must be between 0 and 1"),
            ("high", self.high >= 1, "must be at least 1"),
        ):
            if not fits:
                errors.append(f"{FIELD}.{name}={getattr(self, name)!r}: {wanted}.")
        if any(errors):
            raise ValueError("\n".join(filter(None, errors)))

    def weights(
        self, old_logprobs: Tensor, rollout_logprobs: Tensor, completion_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the weights, and where the bounds change them.

        Args:
            old_logprobs: log π_old as the trainer computes it, (B, T).
            rollout_logprobs: log π_old as the engine reported it, (B, T).
            completion_mask: (B, T), true on sampled tokens; nothing is read outside it.

        Returns:
            Weights and bool, both (B, T) and detached; meaningless outside the mask.

        Raises:
            ValueError: shapes disagree.

        Example:
            >>> import torch
            >>> old, rollout = torch.tensor([[-1.0, -1.0]]), torch.tensor([[-1.0, -9.0]])
            >>> EngineCorrection().weights(old, rollout, torch.ones(1, 2))
            (tensor([[1., 2.]]), tensor([[False,  True]]))
        """
        old = keep_tokens(old_logprobs.detach(), completion_mask, "old_logprobs")
        log_ratio = old - keep_tokens(rollout_logprobs, completion_mask, "rollout_logprobs")
        log_weight = LEVELS[self.level](log_ratio, completion_mask.bool()).expand_as(log_ratio)
        weight = log_weight.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
        is_outside = (weight < self.low) | (weight > self.high)
        if self.outside == "mask":
            return weight.masked_fill(is_outside, 0.0), is_outside
        return weight.clamp(self.low, self.high), is_outside


def _mean(log_ratio: Tensor, mask: Tensor) -> Tensor:
    return log_ratio.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)


LEVELS: Registry[Callable[[Tensor, Tensor], Tensor]] = Registry(
    "level",
    {
        "token": lambda log_ratio, mask: log_ratio,
        "sequence": lambda log_ratio, mask: log_ratio.sum(-1, keepdim=True),
        "sequence_mean": _mean,
    },
)
