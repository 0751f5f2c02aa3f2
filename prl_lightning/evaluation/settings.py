"""Evaluation: the sets that are evaluated, and how."""

from __future__ import annotations

from dataclasses import dataclass, field

from prl_lightning.sampling.base import MIN_TEMPERATURE
from prl_lightning.types import PromptSource


@dataclass(frozen=True)
class Evaluation:
    """The ``evaluation`` section of a configuration.

    Attributes:
        sets: sources of prompts by name, see ``PromptDataModule``; every validation, test and
            predict samples all of them.
        samples: completions per prompt, the n of mean@n.
        pass_at: the values of k of pass@k, each at most ``samples``; pass@1 is mean@n.
        solved_at: a completion is correct if its reward, the weighted sum of all reward
            functions, is at least this.
        temperature: of the sampling. 0 is greedy: all completions of a prompt are one.
        top_p: of the sampling.

    Raises:
        ValueError: a value is out of its range.
    """

    sets: dict[str, str | PromptSource] = field(default_factory=dict)
    samples: int = 8
    pass_at: tuple[int, ...] = (8,)
    solved_at: float = 0.5
    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name, fits, wanted in (
            ("samples", self.samples >= 1, "must be at least 1"),
            (
                "pass_at",
                all(1 <= k <= self.samples for k in self.pass_at),
                f"each k must be between 1 and evaluation.samples={self.samples}",
            ),
            (
                "temperature",
                self.temperature == 0 or self.temperature >= MIN_TEMPERATURE,
                f"must be at least {MIN_TEMPERATURE}, or 0 for greedy sampling",
            ),
            ("top_p", 0 < self.top_p <= 1, "must be above 0 and at most 1"),
        ):
            if not fits:
                raise ValueError(f"evaluation.{name}={getattr(self, name)}: {wanted}.")

    @property
    def metrics(self) -> list[str]:
        """Names of what is logged of each set; maj@n needs a reward that compares answers."""
        passes = [f"pass@{k}" for k in self.pass_at]
        return [f"mean@{self.samples}", *passes, f"maj@{self.samples}"]

    @property
    def caution(self) -> str:
        """What a reader of the metrics has to know about the sampling; empty if nothing."""
        if self.temperature or self.samples == 1:
            return ""
        return (
            f"evaluation.temperature=0 is greedy: the {self.samples} completions of a problem are "
            f"one, so mean@{self.samples}, pass@k and maj@{self.samples} all judge this one."
        )
