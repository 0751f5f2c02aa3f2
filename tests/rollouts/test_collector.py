"""A row is rewarded with the columns of its source, and a set alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch import Trainer

from prl_lightning.rewards import RewardFunction, RewardSum
from prl_lightning.rollouts.collector import Collector
from prl_lightning.rollouts.engine_link import Samples
from prl_lightning.rollouts.rewarding import Rewarder
from prl_lightning.sampling import SamplingConfig
from prl_lightning.types import Completion, Prompt, Rollout

CONFIG = SamplingConfig(2, 1.0, 8, ())
SETS = {
    "held": [Prompt([1], "?", {"answer": 1, "tolerance": 0.25}), Prompt([2], "?", {"answer": 1})],
    "plain": [Prompt([3], "?", {"answer": None}), Prompt([4], "?", {"answer": 2})],
}


def collector(*functions: RewardFunction) -> Collector:
    """Its engine returns each prompt's token, twice."""

    def sample(prompts: Sequence[Prompt], config: SamplingConfig) -> Samples:
        own = [Completion(prompt.token_ids, [0.0], finished=True) for prompt in prompts]
        return Samples(
            list(prompts), [[completion] * config.n for completion in own], config, 0, 0.0
        )

    engine: Any = SimpleNamespace(sample=sample, check_against=lambda rollouts, samples: {})
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    rewarder = Rewarder(RewardSum(functions), trainer)
    return Collector(trainer, SimpleNamespace(), engine, rewarder, str)  # type: ignore[arg-type]


def rewards(rollouts: Sequence[Rollout]) -> list[float]:
    return [rollout.reward for rollout in rollouts]


def close(
    completions: list[str], answer: list[Any], tolerance: list[float] | None = None
) -> list[float | None]:
    """Says which tolerance it got; -1 for none."""
    limits = [-1.0] * len(answer) if tolerance is None else tolerance
    return [None if gold is None else limit for gold, limit in zip(answer, limits, strict=True)]


def test_a_row_has_the_columns_of_its_own_source() -> None:
    prompts = [prompt for own in SETS.values() for prompt in own]
    mixed = [prompts[row] for row in (2, 0, 3, 1)]
    rollouts = [Rollout(p, Completion(p.token_ids, [0.0], finished=True), "?") for p in mixed]
    with pytest.warns(UserWarning, match="1 of 3 completions"):
        values = collector(close, lambda completions: [2.0] * len(completions)).rewarder.reward(
            rollouts
        ) | collector(close).rewarder.reward(rollouts)
    assert rewards(rollouts) == [0.0, 0.25, -1.0, -1.0]
    assert values["unrewarded"] == 1
    assert values["reward/close"] == pytest.approx((0.25 - 1 - 1) / 3)
    assert values["reward/<lambda>"] == 2.0
    assert values["reward_failures/close"] == 0


def test_the_results_of_a_set_do_not_depend_on_the_others() -> None:
    def batch(completions: list[str]) -> list[float]:
        return [random.random() + len(completions)] * len(completions)

    sets = {"held": SETS["held"][:1], "plain": SETS["plain"][1:]}
    state = random.getstate()
    together = collector(close, batch).evaluate(sets, CONFIG)
    assert random.getstate() == state
    for name, prompts in sets.items():
        (alone,) = collector(close, batch).evaluate({name: prompts}, CONFIG).values()
        assert rewards(alone) == rewards(together[name])
        assert [rollout.prompt for rollout in alone] == [prompts[0]] * 2
    swapped = collector(close, batch).evaluate(dict(reversed(sets.items())), CONFIG)
    assert {name: rewards(swapped[name]) for name in sets} == {
        name: rewards(together[name]) for name in sets
    }
