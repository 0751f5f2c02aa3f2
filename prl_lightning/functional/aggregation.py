"""How a value per token becomes one number.

Every loss is a mean or a sum over an update, however the update is cut: pass the update's `Totals`,
and the losses of its micro-batches or ranks add up to the loss of the whole.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from prl_lightning.functional.masks import keep_tokens

Count = int | float | Tensor


@dataclass(frozen=True)
class Totals:
    """What the sums of an update are divided by.

    Attributes:
        num_tokens: completion tokens of the whole update; None counts those at hand.
        num_sequences: completions of the whole update; None counts those at hand that have a token.
        max_length: the completion limit in tokens, which `constant` alone reads and needs.
    """

    num_tokens: Count | None = None
    num_sequences: Count | None = None
    max_length: Count | None = None


AT_HAND = Totals()


def aggregate(
    values: Tensor,
    completion_mask: Tensor,
    kind: str = "token_mean",
    totals: Totals = AT_HAND,
) -> Tensor:
    """One number from a value per token.

    | kind | value | source |
    | --- | --- | --- |
    | token_mean | Σ_i Σ_t v_{i,t} / num_tokens | DAPO, arXiv 2503.14476 |
    | sequence_mean | Σ_i (Σ_t v_{i,t} / T_i) / num_sequences | GRPO, arXiv 2402.03300 |
    | constant | Σ_i Σ_t v_{i,t} / (num_sequences·max_length) | Dr. GRPO, arXiv 2503.20783 |

    Args:
        values: (B, T); not read outside the mask.
        completion_mask: (B, T), true on completion tokens.
        kind: one of the table.
        totals: of the update; by default of these values alone.

    Returns:
        A scalar; 0 if there are no tokens.

    Raises:
        ValueError: if the kind is unknown, shapes disagree, or `constant` has no max_length.

    Example:
        >>> values, mask = torch.tensor([[1.0, 2.0], [6.0, 9.0]]), torch.tensor([[1, 1], [1, 0]])
        >>> aggregate(values, mask, "token_mean"), aggregate(values, mask, "sequence_mean")
        (tensor(3.), tensor(3.7500))
    """
    if kind not in AGGREGATIONS:
        raise ValueError(
            f"aggregation is '{kind}', which is none of {', '.join(AGGREGATIONS)}: use one of these"
        )
    values = keep_tokens(values, completion_mask, "values")
    lengths = completion_mask.bool().sum(-1)
    return AGGREGATIONS[kind](values, lengths, totals)


def _token_mean(values: Tensor, lengths: Tensor, totals: Totals) -> Tensor:
    return values.sum() / _divisor(totals.num_tokens, lengths.sum(), values)


def _sequence_mean(values: Tensor, lengths: Tensor, totals: Totals) -> Tensor:
    means = values.sum(-1) / lengths.clamp(min=1)
    return means.sum() / _divisor(totals.num_sequences, (lengths > 0).sum(), values)


def _constant(values: Tensor, lengths: Tensor, totals: Totals) -> Tensor:
    if totals.max_length is None:
        # The batch's width is no substitute: it depends on padding and on the cut of the update.
        raise ValueError("max_length is None: aggregation 'constant' needs the completion limit")
    sequences = _divisor(totals.num_sequences, (lengths > 0).sum(), values)
    return values.sum() / (sequences * totals.max_length)


def _divisor(total: Count | None, at_hand: Tensor, values: Tensor) -> Count:
    """Return the total, or 1 for 0: nothing over nothing is a loss of 0, not a NaN."""
    count = at_hand if total is None else total
    if not isinstance(count, Tensor):
        return count or 1
    return torch.where(count == 0, torch.ones_like(count), count).to(values)


AGGREGATIONS: dict[str, Callable[[Tensor, Tensor, Totals], Tensor]] = {
    "token_mean": _token_mean,
    "sequence_mean": _sequence_mean,
    "constant": _constant,
}
