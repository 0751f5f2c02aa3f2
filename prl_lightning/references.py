"""Reference: a distribution that the policy pays for leaving, and how it pays."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

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
