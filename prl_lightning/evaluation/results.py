"""The metrics of the evaluation sets, with confidence intervals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, cast

from torch import nn
from torchmetrics import Metric

from prl_lightning.evaluation.metrics import MajorityAtN, MeanOverProblems, PassAtK
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
        pass_curve: ``k`` from 1 to n, and ``pass``, ``low`` and ``high`` for each k.
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
        self.evaluation = evaluation
        self.passes = PassAtK(range(1, evaluation.samples + 1))
        self.majority = MajorityAtN()
        self.no_answer = MeanOverProblems()
        self.length = MeanOverProblems()
        self.compares_answers = False

    def update(self, batch: RolloutBatch) -> None:
        """Add the group of one problem; a padding problem adds nothing."""
        rows = slice(0, 0 if batch.is_padding else 1)
        correct = (batch.rewards >= self.evaluation.solved_at)[None][rows]
        self.passes.update(correct.sum(1), self.evaluation.samples)
        self.length.update(batch.completion_lengths[None][rows].double().mean(1))
        # The reward functions decide this, so it is equal on all ranks.
        self.compares_answers = batch.answers is not None
        if batch.answers is not None:
            answers = batch.answers[None][rows]
            self.majority.update(answers, correct)
            self.no_answer.update((answers < 0).double().mean(1))

    def results(self) -> SetResults:
        """Compute everything over all ranks and reset; a collective under DDP."""
        samples = self.evaluation.samples
        # compute() of torchmetrics returns a scalar for a single k.
        means = self.passes.compute().view(-1).tolist()
        lows, highs = self.passes.interval().tolist()
        curve = [Estimate(*ends) for ends in zip(means, lows, highs, strict=True)]
        metrics = {f"mean@{samples}": curve[0]}
        metrics |= {f"pass@{k}": curve[k - 1] for k in self.evaluation.pass_at}
        if self.compares_answers:
            metrics |= {f"maj@{samples}": _estimate(self.majority)}
            metrics |= {"no_answer": _estimate(self.no_answer)}
        metrics |= {"length": _estimate(self.length)}
        results = SetResults(
            problems=len(self.length.per_problem()),
            samples=samples,
            metrics=metrics,
            pass_curve={
                "k": list(range(1, samples + 1)),
                "pass": means,
                "low": lows,
                "high": highs,
            },
        )
        for metric in self.children():
            cast(Metric, metric).reset()
        return results


def _estimate(metric: MeanOverProblems | MajorityAtN) -> Estimate:
    return Estimate(metric.compute().item(), *metric.interval().tolist())
