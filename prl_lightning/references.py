"""Reference: a distribution that the policy pays for leaving, and how it pays."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from prl_lightning.functional import others_mean, process_term
from prl_lightning.functional.divergences import DIVERGENCES
from prl_lightning.functional.process_shapes import SHAPES


@dataclass(frozen=True)
class Reference:
    """One term of the advantage: A_t = w·A - Σ_k β_k reg^(k)_t.

    Attributes:
        kind: "model" (frozen weights), "uniform" (every token is equally likely; no second model),
            or "moving" (the policy as it was up to `every` iterations ago; one copy of it).
        model: Hugging Face id or folder of kind="model"; null is the policy's starting weights.
        every: iterations after which kind="moving" becomes the current policy.
        beta: weight.
        divergence: see ``Objective.divergence``.
        discount: of the later tokens' terms. 1 is the gradient of the KL of whole completions, 0
            counts the token's own term alone.
        shape: what becomes of the term: "plain", "per_remaining", "per_length", "shuffled", or a
            name of `register_shape`.
        centre: subtract the mean term of the other completions at the same position: of the
            "group" or of the "batch", which is the iteration. The policy is then scored before the
            update. The expected gradient stays the same.
    """

    kind: Literal["model", "uniform", "moving"] = "model"
    model: str | None = None
    every: int = 1
    beta: float = 0.01
    divergence: str = "reverse_kl"
    discount: float = 1.0
    shape: str = "plain"
    centre: Literal["none", "group", "batch"] = "none"

    def errors(self, field: str) -> Iterator[str]:
        """Yield what cannot work, before a user's names are registered.

        Args:
            field: of the configuration, for the messages.
        """
        for name, fits, wanted in (
            ("kind", self.kind in ("model", "uniform", "moving"), "use model, uniform or moving"),
            ("centre", self.centre in ("none", "group", "batch"), "use none, group or batch"),
            ("beta", 0 <= self.beta < float("inf"), "must be 0 or a positive number"),
            ("discount", 0 <= self.discount <= 1, "must be between 0 and 1"),
            ("every", self.every >= 1, "must be at least 1"),
            ("model", self.model is None or self.kind == "model", f"not with kind={self.kind!r}"),
        ):
            if not fits:
                yield f"{field}.{name}={getattr(self, name)!r}: {wanted}."

    def name_errors(self, field: str) -> list[str | None]:
        """Return messages for names that nobody has registered.

        Args:
            field: of the configuration, for the messages.
        """
        return [
            DIVERGENCES.error(self.divergence, f"{field}.divergence"),
            SHAPES.error(self.shape, f"{field}.shape"),
        ]


def process_terms(
    references: Collection[Reference],
    log_ratios: Tensor,
    completion_mask: Tensor,
    step_ends: Tensor | None = None,
) -> Tensor:
    """Return Σ_k β_k reg^(k)_t, which is subtracted from the outcome advantage.

    Args:
        references: K of them, at least one.
        log_ratios: (B, T, K).
        completion_mask: (B, T), true on completion tokens.
        step_ends: bool (B, T), or None for the token form.

    Returns:
        (B, T), detached, in the unit of the advantage.
    """
    columns = zip(references, log_ratios.unbind(-1), strict=True)
    return torch.stack([_term(*each, completion_mask, step_ends) for each in columns]).sum(0)


def centres(
    references: Collection[Reference],
    log_ratios: Tensor,
    completion_mask: Tensor,
    group_size: int,
) -> Tensor:
    """Return what the centred terms are compared with: added to the outcome advantage, it centres.

    Args:
        references: K of them.
        log_ratios: (B, T, K) of all rollouts of the iteration, groups contiguous.
        completion_mask: (B, T), true on completion tokens.
        group_size: completions of a prompt.

    Returns:
        (B, T), detached, in the unit of the advantage.
    """
    total = log_ratios.new_zeros(completion_mask.shape)
    for reference, column in zip(references, log_ratios.unbind(-1), strict=True):
        if reference.centre != "none":
            size = group_size if reference.centre == "group" else len(column)
            term = _term(reference, column, completion_mask)
            total = total + others_mean(term, completion_mask, size)
    return total


def _term(
    reference: Reference, log_ratios: Tensor, mask: Tensor, step_ends: Tensor | None = None
) -> Tensor:
    return reference.beta * process_term(
        log_ratios,
        mask,
        reference.divergence,
        step_ends,
        discount=reference.discount,
        shape=reference.shape,
    )
