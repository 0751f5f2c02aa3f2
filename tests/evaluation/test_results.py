"""The results of a set against counts made by hand."""

from __future__ import annotations

import pytest
import torch

from conftest import MakeRollout
from prl_lightning.data import collate
from prl_lightning.evaluation import Evaluation
from prl_lightning.evaluation.results import SetMetrics
from prl_lightning.types import RolloutBatch


def group(
    make_rollout: MakeRollout, rewards: list[float], answers: list[int | None], lengths: list[int]
) -> RolloutBatch:
    rollouts = [make_rollout([3], [4] * length) for length in lengths]
    for rollout, reward, answer in zip(rollouts, rewards, answers, strict=True):
        rollout.reward, rollout.answer = reward, answer
    return collate(rollouts, update_tokens=1, update_sequences=1)


def test_two_problems_by_hand(make_rollout: MakeRollout) -> None:
    metrics = SetMetrics(Evaluation(samples=3, pass_at=(2,)))
    metrics.update(group(make_rollout, [1.0, 0.6, 0.0], [0, 0, -1], [1, 2, 3]))
    metrics.update(group(make_rollout, [0.4, 0.0, 0.0], [0, 1, -1], [4, 4, 10]))
    padding = group(make_rollout, [1.0, 1.0, 1.0], [0, 0, 0], [9, 9, 9])
    padding.is_padding = True
    metrics.update(padding)
    found = metrics.results()
    assert (found.problems, found.samples) == (2, 3)
    means = {name: estimate.mean for name, estimate in found.metrics.items()}
    assert means == pytest.approx(
        {"mean@3": 1 / 3, "pass@2": 0.5, "maj@3": 0.5, "no_answer": 1 / 3, "length": 4.0}
    )
    # Of two problems a resample has none, one or both of the solved one.
    assert found.metrics["mean@3"][1:] == pytest.approx((0.0, 2 / 3))
    assert found.metrics["length"][1:] == pytest.approx((2.0, 6.0))
    assert found.pass_curve["k"] == [1, 2, 3]
    assert found.pass_curve["pass"] == pytest.approx([1 / 3, 0.5, 0.5])
    assert found.pass_curve["low"] == pytest.approx([0, 0, 0])
    assert found.pass_curve["high"] == pytest.approx([2 / 3, 1, 1])


def test_a_reward_of_exactly_that_much_is_solved(make_rollout: MakeRollout) -> None:
    metrics = SetMetrics(Evaluation(samples=2, pass_at=()))
    metrics.update(group(make_rollout, [0.5, 0.499], [None, None], [1, 1]))
    assert metrics.results().metrics["mean@2"].mean == 0.5


def test_results_begin_anew(make_rollout: MakeRollout) -> None:
    metrics = SetMetrics(Evaluation(samples=1, pass_at=()))
    for reward in (1.0, 0.0):
        metrics.update(group(make_rollout, [reward], [0], [2]))
        assert metrics.results().metrics["mean@1"].mean == reward


def test_without_answers_there_is_no_vote(make_rollout: MakeRollout) -> None:
    metrics = SetMetrics(Evaluation(samples=2, pass_at=(1,)))
    metrics.update(group(make_rollout, [1.0, 0.0], [None, None], [2, 2]))
    assert set(metrics.results().metrics) == {"mean@2", "pass@1", "length"}


def test_metrics_move_with_the_module() -> None:
    """Their states are where the samples are, whatever the module's own precision is."""
    metrics = SetMetrics(Evaluation(samples=1, pass_at=(1,))).to(torch.bfloat16)
    assert metrics.length.per_problem().dtype == torch.float64
