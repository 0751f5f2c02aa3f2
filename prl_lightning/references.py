"""Reference: a distribution that the policy pays for leaving, and how it pays."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from math import inf, nan
from typing import Literal

import torch
from torch import Tensor

from prl_lightning.distributed import sum_over_ranks
from prl_lightning.functional import others_mean, process_term
from prl_lightning.functional.divergences import DIVERGENCES
from prl_lightning.functional.process_shapes import SHAPES

TOLERANCE, STEP = 1.5, 2.0  # PPO's adaptive KL penalty
BOUNDS = (0.001, 1.0)


@dataclass(frozen=True)
class Reference:
    """One term of the advantage: A_t = w·A - Σ_k β_k reg^(k)_t.

    Attributes:
        kind: "model" (frozen weights), "uniform" (every token is equally likely; no second model),
            or "moving" (the policy as it was up to `every` iterations ago; one copy of it).
        model: Hugging Face id or folder of kind="model"; null is the policy's starting weights.
        every: iterations after which kind="moving" becomes the current policy.
        beta: weight; with a target, that of the first iteration.
        target: nats a token; null keeps beta. With a target, beta follows the KL: see `steered`.
        min_beta: lower bound of a beta that follows. At first the policy is the reference, so that
            beta falls until the KL comes near the target; from the default bound it is back at the
            default beta after four iterations.
        max_beta: upper bound of a beta that follows. An outcome advantage is about 1.
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
    target: float | None = None
    min_beta: float = BOUNDS[0]
    max_beta: float = BOUNDS[1]
    divergence: str = "reverse_kl"
    discount: float = 1.0
    shape: str = "plain"
    centre: Literal["none", "group", "batch"] = "none"

    def steered(self, kl: float) -> Reference:
        """Return this reference with the beta of the next iteration.

        The rule of PPO's adaptive KL penalty (arXiv 1707.06347, section 4), within bounds: beta is
        doubled if the KL is above 1.5 times the target, and halved if it is below the target / 1.5.

        Args:
            kl: mean of log π - log π_ref over the tokens of an iteration, in nats; NaN changes
                nothing.
        """
        if self.target is None:
            return self
        beta = self.beta
        if kl > TOLERANCE * self.target:
            beta *= STEP
        elif kl < self.target / TOLERANCE:
            beta /= STEP
        return self.with_beta(beta)

    def with_beta(self, beta: float) -> Reference:
        """Return this reference with another beta, within the bounds."""
        return replace(self, beta=min(max(beta, self.min_beta), self.max_beta))

    def errors(self, field: str) -> Iterator[str]:
        """Yield what cannot work, before a user's names are registered.

        Args:
            field: of the configuration, with a dot at its end unless it is empty.
        """
        follows = self.target is not None
        for name, fits, wanted in (
            ("kind", self.kind in ("model", "uniform", "moving"), "use model, uniform or moving"),
            ("centre", self.centre in ("none", "group", "batch"), "use none, group or batch"),
            ("beta", 0 <= self.beta < inf, "must be 0 or a positive number"),
            (
                "target",
                self.target is None or 0 < self.target < inf,
                "must be a positive number or null",
            ),
            ("discount", 0 <= self.discount <= 1, "must be between 0 and 1"),
            ("every", self.every >= 1, "must be at least 1"),
            ("model", self.model is None or self.kind == "model", f"not with kind={self.kind!r}"),
        ):
            if not fits:
                yield f"{field}{name}={getattr(self, name)!r}: {wanted}."
        bounds = f"min_beta={self.min_beta}, max_beta={self.max_beta}"
        if not follows and (self.min_beta, self.max_beta) != BOUNDS:
            yield f"{field}target=None with {bounds}: only a beta that follows a target has bounds."
        if follows and not 0 < self.min_beta <= self.beta <= self.max_beta < inf:
            yield (
                f"{field}target={self.target} with beta={self.beta}, {bounds}: beta follows the KL "
                "within these bounds. Set 0 < min_beta <= beta <= max_beta."
            )

    def name_errors(self, field: str) -> list[str | None]:
        """Return messages for names that nobody has registered.

        Args:
            field: see ``errors``.
        """
        return [
            DIVERGENCES.error(self.divergence, f"{field}divergence"),
            SHAPES.error(self.shape, f"{field}shape"),
        ]


class MeanKL:
    """The KL to each reference, as a mean over an iteration's completion tokens on all ranks.

    Attributes:
        totals: the sums of the KLs and the number of tokens, of the updates that are finished. A
            checkpoint within an update repeats it, so that a part of one must not count. Equal on
            all ranks; empty before the first update.
    """

    def __init__(self) -> None:
        self.totals: list[float] = []
        self._update: list[Tensor] = []  # by micro-batch, of this rank

    def add(self, log_ratios: Tensor, completion_mask: Tensor) -> None:
        """Add a micro-batch.

        Args:
            log_ratios: log π - log π_ref, (B, T, K); not read outside the mask.
            completion_mask: (B, T), true on completion tokens.
        """
        mask = completion_mask.bool()
        sums = log_ratios.detach().double().masked_fill(~mask[..., None], 0.0).sum((0, 1))
        self._update.append(torch.cat([sums, mask.sum()[None]]))

    def end_update(self) -> None:
        """Count the micro-batches of an update; a collective."""
        update, self._update = torch.stack(self._update).sum(0).cpu(), []
        update = sum_over_ranks(update)
        before = update.new_tensor(self.totals) if self.totals else torch.zeros_like(update)
        self.totals = (before + update).tolist()

    def end_iteration(self) -> list[float]:
        """Return the K means and begin a new iteration; NaN without tokens."""
        (*sums, tokens), self.totals = self.totals, []
        return [kl / tokens if tokens else nan for kl in sums]


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
