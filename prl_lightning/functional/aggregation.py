"""Aggregate a value per token into one number.

Every kind is a mean or a sum over an update. An `Aggregation` with the totals of the update makes
the losses of its micro-batches or ranks add up to the loss of the whole.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from prl_lightning.functional.masks import keep_tokens
from prl_lightning.functional.registry import Registry

Count = int | float | Tensor


@dataclass(frozen=True)
class Aggregation:
    """A kind of mean, and the totals of the update that it divides by.

    | kind | value | source |
    | --- | --- | --- |
    | token_mean | Σ_i Σ_t v_{i,t} / num_tokens | DAPO, arXiv 2503.14476 |
    | sequence_mean | Σ_i (Σ_t v_{i,t} / T_i) / num_sequences | GRPO, arXiv 2402.03300 |
    | constant | Σ_i Σ_t v_{i,t} / (num_sequences·max_length) | Dr. GRPO, arXiv 2503.20783 |

    Attributes:
        kind: a name of the table.
        num_tokens: completion tokens of the whole update; None counts those of this batch.
        num_sequences: completions of the whole update; None counts those of this batch that have a
            token.
        max_length: the completion limit in tokens; only `constant` reads it, and needs it.
    """

    kind: str = "token_mean"
    num_tokens: Count | None = None
    num_sequences: Count | None = None
    max_length: Count | None = None


TOKEN_MEAN = Aggregation()


def aggregate(
    values: Tensor, completion_mask: Tensor, aggregation: Aggregation = TOKEN_MEAN
) -> Tensor:
    """Return one number from a value per token.

    Args:
        values: (B, T); not read outside the mask.
        completion_mask: (B, T), true on completion tokens.
        aggregation: by default the token mean of this batch alone.

    Returns:
        A scalar; 0 if there are no tokens.

    Raises:
        ValueError: the kind is unknown, shapes disagree, or `constant` has no max_length.

    Example:
        >>> values, mask = torch.tensor([[1.0, 2.0], [6.0, 9.0]]), torch.tensor([[1, 1], [1, 0]])
        >>> aggregate(values, mask), aggregate(values, mask, Aggregation("sequence_mean"))
        (tensor(3.), tensor(3.7500))
    """
    values = keep_tokens(values, completion_mask, "values")
    return AGGREGATIONS[aggregation.kind](values, completion_mask.bool().sum(-1), aggregation)


def _token_mean(values: Tensor, lengths: Tensor, totals: Aggregation) -> Tensor:
    return values.sum() / _divisor(totals.num_tokens, lengths.sum(), values)


def _sequence_mean(values: Tensor, lengths: Tensor, totals: Aggregation) -> Tensor:
    means = values.sum(-1) / lengths.clamp(min=1)
    return means.sum() / _divisor(totals.num_sequences, (lengths > 0).sum(), values)


def _constant(values: Tensor, lengths: Tensor, totals: Aggregation) -> Tensor:
    if totals.max_length is None:
        # The width of the batch is no substitute: it depends on padding and micro-batches.
        raise ValueError("max_length=None: aggregation 'constant' needs the completion limit.")
    sequences = _divisor(totals.num_sequences, (lengths > 0).sum(), values)
    return values.sum() / (sequences * totals.max_length)


def _divisor(total: Count | None, of_batch: Tensor, values: Tensor) -> Count:
    """Return the total, or 1 instead of 0, so that the loss of no tokens is 0 and not NaN."""
    count = of_batch if total is None else total
    if not isinstance(count, Tensor):
        return count or 1
    return torch.where(count == 0, torch.ones_like(count), count).to(values)


AGGREGATIONS: Registry[Callable[[Tensor, Tensor, Aggregation], Tensor]] = Registry(
    "aggregation",
    {"token_mean": _token_mean, "sequence_mean": _sequence_mean, "constant": _constant},
)
