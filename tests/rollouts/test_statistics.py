"""Statistics of an iteration's rollouts, by hand."""

from __future__ import annotations

import pytest

from conftest import MakeRollout
from prl_lightning.rollouts.statistics import describe, reduction_of


def test_three_groups_of_two_by_hand(
    make_rollout: MakeRollout, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollouts = [make_rollout([3], [4] * length) for length in (1, 2, 3, 4, 5, 9)]
    for rollout, reward in zip(rollouts, (1.0, 1.0, 0.0, 1.0, 0.0, 0.0), strict=True):
        rollout.reward = reward
    found = describe(rollouts, 2, sampling_seconds=4.0)
    assert found == pytest.approx(
        {
            "reward": 0.5,
            "reward_std": 0.5,
            "groups_without_signal": 2 / 3,
            "completion_length": 4.0,
            "completion_length_max": 9.0,
            "cut_at_limit": 0.0,
            "tokens": 24.0,
            "tokens_per_second": 6.0,
        }
    )
    # A second rank with the same rollouts changes no mean.
    monkeypatch.setattr("prl_lightning.rollouts.statistics.sum_over_ranks", lambda own: 2 * own)
    doubled = describe(rollouts, 2, sampling_seconds=4.0)
    assert doubled == found | {"tokens": 48.0, "tokens_per_second": 12.0}


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("reward_failures/MathReward", "sum"),
        ("unrewarded", "sum"),
        ("completion_length_max", "max"),
        ("sampling_seconds", "max"),
        ("reward/length_max", "mean"),  # a user's function
        ("tokens_per_second", "mean"),
        ("engine_gap", "mean"),
    ],
)
def test_the_reduction_over_ranks(name: str, how: str) -> None:
    assert reduction_of(name) == how
