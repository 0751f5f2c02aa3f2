"""The results of a set against counts made by hand."""

from __future__ import annotations

from typing import Any

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
    curve = {"pass": [1 / 3, 0.5, 0.5], "low": [0, 0, 0], "high": [2 / 3, 1, 1]}
    assert found.pass_curve.pop("k") == [1, 2, 3]
    assert found.pass_curve == {name: pytest.approx(values) for name, values in curve.items()}


def test_a_single_sample_has_a_curve_and_results_begin_anew(make_rollout: MakeRollout) -> None:
    metrics = SetMetrics(Evaluation(samples=1, pass_at=()))
    for reward in (1.0, 0.0):
        metrics.update(group(make_rollout, [reward], [0], [2]))
        found = metrics.results()
        assert found.metrics["mean@1"].mean == reward
        assert found.pass_curve == {"k": [1], "pass": [reward], "low": [reward], "high": [reward]}


def test_without_answers_there_is_no_vote_and_exactly_the_limit_is_solved(
    make_rollout: MakeRollout,
) -> None:
    metrics = SetMetrics(Evaluation(samples=2, pass_at=(1,), solved_at=0.25))
    metrics.update(group(make_rollout, [0.25, 0.249], [None, None], [2, 2]))
    found = metrics.results().metrics
    assert set(found) == {"mean@2", "pass@1", "length"}
    assert found["mean@2"].mean == 0.5


def test_states_are_float64_whatever_the_precision_of_the_module() -> None:
    metrics = SetMetrics(Evaluation(samples=1, pass_at=(1,))).to(torch.bfloat16)
    assert metrics.length.per_problem().dtype == torch.float64


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 0, "pass_at": ()}, "samples=0"),
        ({"samples": 4, "pass_at": (2, 5)}, r"pass_at=\(2, 5\)"),
        ({"samples": 4, "pass_at": (0,)}, r"pass_at=\(0,\)"),
        ({"temperature": -0.5}, r"temperature=-0\.5"),
        ({"temperature": 0.009}, r"temperature=0\.009.*at least 0\.01"),
        ({"temperature": float("nan")}, r"temperature=nan"),
        ({"top_p": 0.0}, r"top_p=0\.0"),
        ({"top_p": 1.5}, r"top_p=1\.5"),
    ],
)
def test_settings_out_of_range_are_errors(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"evaluation\.{message}"):
        Evaluation(**settings)
