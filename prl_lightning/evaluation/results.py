"""The metrics of the evaluation sets, with confidence intervals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from torch import nn

from prl_lightning.evaluation.metrics import (
    MajorityAtN,
    MeanAtN,
    MeanOverProblems,
    PassAtK,
    PassCurve,
)
from prl_lightning.evaluation.settings import Evaluation
from prl_lightning.types import RolloutBatch


class Estimate(NamedTuple):
    """A mean over problems and its 95% bootstrap interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class SetResults:
    """One evaluation of one set.

    Attributes:
        problems: number of problems.
        samples: completions per problem.
        metrics: mean@n, pass@k, maj@n, no_answer and length by name; maj@n and no_answer only if a
            reward function compares answers.
        pass_curve: ``k`` from 1 to n, and ``pass``, ``low`` and ``high`` at each.
    """

    problems: int
    samples: int
    metrics: dict[str, Estimate]
    pass_curve: dict[str, list[float]]


class SetMetrics(nn.Module):
    """The metrics of one evaluation set; all ranks update and compute them together.

    Args:
        evaluation: the settings.
    """

    def __init__(self, evaluation: Evaluation) -> None:
        super().__init__()
        self.samples = samples = evaluation.samples
        self.solved_at = evaluation.solved_at
        self.counts = nn.ModuleDict({f"mean@{samples}": MeanAtN()})
        self.counts.update({f"pass@{k}": PassAtK(k) for k in evaluation.pass_at})
        self.curve = PassCurve(samples)
        self.majority = MajorityAtN()
        self.no_answer = MeanOverProblems()
        self.length = MeanOverProblems()
        self.compares_answers = False

    def update(self, batch: RolloutBatch) -> None:
        """Add the group of one problem; a padding problem adds nothing."""
        rows = slice(0, 0 if batch.is_padding else 1)
        correct = (batch.rewards >= self.solved_at)[None][rows]
        for metric in (*self.counts.values(), self.curve):
            cast(MeanAtN, metric).update(correct.sum(1), self.samples)
        self.length.update(batch.completion_lengths[None][rows].double().mean(1))
        # Decided by the reward functions, so equal on all ranks.
        self.compares_answers = batch.answers is not None
        if batch.answers is not None:
            answers = batch.answers[None][rows]
            self.majority.update(answers, correct)
            self.no_answer.update((answers < 0).double().mean(1))

    def results(self) -> SetResults:
        """Compute everything over all ranks and reset; a collective under DDP."""
        metrics: dict[str, Any] = {**self.counts}
        if self.compares_answers:
            metrics |= {f"maj@{self.samples}": self.majority, "no_answer": self.no_answer}
        metrics["length"] = self.length
        low, high = self.curve.interval().tolist()
        results = SetResults(
            problems=len(self.length.per_problem()),
            samples=self.samples,
            metrics={
                name: Estimate(metric.compute().item(), *metric.interval().tolist())
                for name, metric in metrics.items()
            },
            pass_curve={
                "k": list(range(1, self.samples + 1)),
                "pass": self.curve.compute().tolist(),
                "low": low,
                "high": high,
            },
        )
        for metric in (*metrics.values(), self.curve):
            metric.reset()
        return results
