"""How a value per token becomes one number.

Every loss is a mean or a sum over an update, however the update is cut: pass the update's totals
(`num_tokens`, `num_sequences`), and the losses of its micro-batches or ranks add up to the loss of
the whole.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from prl_lightning.functional.masks import keep_tokens

Count = int | float | Tensor


def aggregate(
    values: Tensor,
    completion_mask: Tensor,
    kind: str = "token_mean",
    *,
    num_tokens: Count | None = None,
    num_sequences: Count | None = None,
    max_length: Count | None = None,
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
        num_tokens: completion tokens of the whole update; None counts this batch's.
        num_sequences: completions of the whole update; None counts this batch's that have a token.
        max_length: the completion limit in tokens, which only `constant` reads and needs.

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
    tokens = _divisor(lengths.sum() if num_tokens is None else num_tokens, values)
    sequences = _divisor((lengths > 0).sum() if num_sequences is None else num_sequences, values)
    return AGGREGATIONS[kind](values, lengths, tokens, sequences, max_length)


def _divisor(count: Count, values: Tensor) -> Tensor:
    """Return the count, or 1 for 0: nothing over nothing is a loss of 0, not a NaN."""
    count = torch.as_tensor(count, dtype=values.dtype, device=values.device)
    return torch.where(count == 0, torch.ones_like(count), count)


def _token_mean(
    values: Tensor, lengths: Tensor, tokens: Tensor, sequences: Tensor, max_length: Count | None
) -> Tensor:
    return values.sum() / tokens


def _sequence_mean(
    values: Tensor, lengths: Tensor, tokens: Tensor, sequences: Tensor, max_length: Count | None
) -> Tensor:
    return (values.sum(-1) / lengths.clamp(min=1)).sum() / sequences


def _constant(
    values: Tensor, lengths: Tensor, tokens: Tensor, sequences: Tensor, max_length: Count | None
) -> Tensor:
    if max_length is None:
        # The batch's width is no substitute: it depends on padding and on the cut of the update.
        raise ValueError("max_length is None: aggregation 'constant' needs the completion limit")
    return values.sum() / (sequences * max_length)


AGGREGATIONS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, Count | None], Tensor]] = {
    "token_mean": _token_mean,
    "sequence_mean": _sequence_mean,
    "constant": _constant,
}
