"""What an evaluation set's samples say, with how sure it is."""

from __future__ import annotations

from collections.abc import Iterable
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
        problems: how many.
        samples: of each.
        metrics: mean@n, pass@k, maj@n, no_answer and length by name; maj@n and no_answer where a
            reward function tells answers apart.
        pass_curve: ``k`` from 1 to n, and ``pass``, ``low`` and ``high`` at each.
    """

    problems: int
    samples: int
    metrics: dict[str, Estimate]
    pass_curve: dict[str, list[float]]


class SetMetrics(nn.Module):
    """The metrics of one evaluation set; all ranks update and compute them together.

    Args:
        samples: n, of each problem.
        pass_at: the k of pass@k.
        solved_at: a completion counts as correct from this reward on.
    """

    def __init__(self, samples: int, pass_at: Iterable[int], solved_at: float) -> None:
        super().__init__()
        self.samples = samples
        self.solved_at = solved_at
        self.counts = nn.ModuleDict({f"mean@{samples}": MeanAtN()})
        self.counts.update({f"pass@{k}": PassAtK(k) for k in pass_at})
        self.curve = PassCurve(samples)
        self.majority = MajorityAtN()
        self.no_answer = MeanOverProblems()
        self.length = MeanOverProblems()
        self.tells_answers = False

    def update(self, batch: RolloutBatch) -> None:
        """Add the group of one problem; of a padding problem, which is none, nothing."""
        rows = slice(0, 0 if batch.is_padding else 1)
        correct = (batch.rewards >= self.solved_at)[None][rows]
        for metric in (*self.counts.values(), self.curve):
            cast(MeanAtN, metric).update(correct.sum(1), self.samples)
        self.length.update(batch.completion_mask.sum(1)[None][rows].double().mean(1))
        # The rewards decide it, so that every rank does alike.
        self.tells_answers = batch.answers is not None
        if batch.answers is not None:
            answers = batch.answers[None][rows]
            self.majority.update(answers, correct)
            self.no_answer.update((answers < 0).double().mean(1))

    def results(self) -> SetResults:
        """Everything over all ranks, and begin anew; a collective under DDP."""
        metrics: dict[str, Any] = {**self.counts}
        if self.tells_answers:
            metrics |= {f"maj@{self.samples}": self.majority, "no_answer": self.no_answer}
        metrics["length"] = self.length
        low, high = self.curve.interval().tolist()
        found = SetResults(
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
        return found
