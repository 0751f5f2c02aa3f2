"""Outcome advantages of rollouts compare the groups of all ranks."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from prl_lightning.data.rollouts import MicroBatches
from prl_lightning.functional import outcome_advantages
from prl_lightning.module import PRLModule
from prl_lightning.objective import Objective
from prl_lightning.references import Reference
from prl_lightning.rewards import RewardSum
from prl_lightning.rollouts import advantages
from prl_lightning.rollouts.advantages import set_advantages
from prl_lightning.rollouts.rewarding import Rewarder
from prl_lightning.types import Completion, Prompt, Rollout

GROUP = 4


class Module:
    """Scores a token by its id: the policy log 0.1·id, the reference 0."""

    def __init__(self, objective: Objective) -> None:
        self.objective, self.device, self.references = objective, "cpu", ["reference"]

    def score(self, batch: Any) -> Tensor:
        return batch.completion_ids * 0.125

    def score_references(self, batch: Any) -> Tensor:
        return torch.zeros(*batch.completion_ids.shape, 1)


def rollouts_of(rewards: Tensor) -> list[Rollout]:
    """Two reward functions: the first is a tenth, the second three times as large."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 6, (len(rewards),), generator=generator).tolist()
    return [
        Rollout(
            Prompt([1 + i // GROUP], ""),
            Completion([1 + (i + t) % 5 for t in range(length)], [-1.0] * length, True),
            "",
            reward=reward,
            reward_parts=[(1.0, 0.1 * reward), (0.5, 3.0 * (i % 3))],
        )
        for i, (reward, length) in enumerate(zip(rewards.tolist(), lengths, strict=True))
    ]


def compare(objective: Objective, rollouts: list[Rollout]) -> list[Tensor]:
    set_advantages(cast(PRLModule, Module(objective)), rollouts, GROUP, 1, MicroBatches(1))
    return [rollout.outcome_advantage for rollout in rollouts]


def on_ranks(
    objective: Objective, shares: list[list[Rollout]], monkeypatch: pytest.MonkeyPatch
) -> list[list[Tensor]]:
    """Each rank's advantages: a first pass records what a rank sends, a second one delivers it."""
    sent: list[Any] = []
    monkeypatch.setattr(advantages, "all_gather", lambda own: sent.append(own) or [own])
    for share in shares:
        compare(objective, share)
    monkeypatch.setattr(advantages, "all_gather", lambda own: sent)
    results = []
    for index, share in enumerate(shares):
        monkeypatch.setattr(advantages, "rank", lambda index=index: index)
        results.append(compare(objective, share))
    return results


@pytest.mark.parametrize(
    "objective",
    [
        Objective(outcome="batch_std", kl="none"),
        Objective(outcome="batch_std", decouple_rewards=True, kl="none"),
        Objective(outcome="batch_std", kl="reward_trajectory", beta=0.1),
        Objective(outcome="batch_std", kl="reward_step", beta=0.1),
        Objective(outcome="grpo", divergence="reverse_k3", baseline=True, beta=0.1),
        Objective(references={"start": Reference(beta=0.1, centre="group")}),
        Objective(references={"start": Reference(beta=0.1, centre="batch")}),
    ],
    ids=lambda o: f"{o.outcome} {o.kl} {o.decouple_rewards} {len(o.references)}",
)
def test_the_number_of_ranks_changes_nothing(
    objective: Objective, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit: on one rank, and on two with the groups dealt out in turn."""
    rewards = torch.randn(6 * GROUP, generator=torch.Generator().manual_seed(0))
    whole = rollouts_of(rewards)
    want = compare(objective, whole)
    own = [[i for i in range(len(whole)) if i // GROUP % 2 == rank] for rank in (0, 1)]
    got = on_ranks(objective, [[whole[i] for i in rows] for rows in own], monkeypatch)
    for rank, rows in enumerate(own):
        for mine, i in zip(got[rank], rows, strict=True):
            assert mine.shape == want[i].shape
            assert torch.equal(mine, want[i])
    assert len({round(a.flatten()[0].item(), 4) for a in want}) > 12


def test_gdpo_by_hand() -> None:
    """The first function decides in the first group, the second alone in the second group.

    Sums: 1·(±1) twice, then 0.5·(±1); their deviation over the batch is √((1 + 1/4)/2).
    """
    objective = Objective(outcome="batch_std", decouple_rewards=True, kl="none")
    parts = [(1.0, 7.0), (0.0, 7.0), (0.0, 5.0), (0.0, 9.0)]
    rollouts = [
        Rollout(Prompt([i // 2], ""), Completion([1], [-1.0], True), "", reward_parts=list(pairs))
        for i, pairs in enumerate([(1.0, own[0]), (0.5, own[1])] for own in parts)
    ]
    set_advantages(
        cast(PRLModule, SimpleNamespace(objective=objective)), rollouts, 2, 1, MicroBatches(1)
    )
    std = (5 / 8) ** 0.5
    got = [rollout.outcome_advantage.item() for rollout in rollouts]
    assert got == pytest.approx([1 / std, -1 / std, -0.5 / std, 0.5 / std])


def test_a_group_is_compared_by_the_sum_of_its_rewards() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0])
    got = torch.stack(compare(Objective(kl="none"), rollouts_of(rewards)))
    assert torch.equal(got, outcome_advantages(rewards, GROUP))


@pytest.mark.parametrize("mask_truncated", [False, True])
def test_a_truncated_completion_is_compared_but_not_trained_on(mask_truncated: bool) -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0])
    rollouts = rollouts_of(rewards)
    for rollout in rollouts[1:3]:
        rollout.completion = replace(rollout.completion, finished=False)
    got = compare(Objective(kl="none", mask_truncated=mask_truncated), rollouts)
    assert torch.equal(torch.stack(got), outcome_advantages(rewards, GROUP))
    kept = not mask_truncated
    assert [rollout.in_loss for rollout in rollouts] == [True, kept, kept, True]


def test_the_parts_of_a_reward_come_with_their_weights() -> None:
    """From rows with different columns: NaN where a function returns None."""

    def is_a(completions: list[str], **_: Any) -> list[float]:
        return [float(text == "a") for text in completions]

    def only_b(completions: list[str], **_: Any) -> list[float | None]:
        return [2.0 if text == "b" else None for text in completions]

    prompts = [Prompt([1], "?", {"level": 1} if row % 2 else {}) for row in range(3)]
    rollouts = [
        Rollout(prompt, Completion([2], [0.0], True), text)
        for prompt, text in zip(prompts, "aba", strict=True)
    ]
    trainer = Trainer(logger=False, accelerator="cpu", barebones=True)
    Rewarder(RewardSum([is_a, only_b], weights=[0.5, 3.0], limits=None), trainer).reward(rollouts)
    assert [rollout.reward for rollout in rollouts] == [0.5, 6.0, 0.5]
    parts = [[value for pair in rollout.reward_parts for value in pair] for rollout in rollouts]
    want = [[0.5, 1.0, 3.0, math.nan], [0.5, 0.0, 3.0, 2.0], [0.5, 1.0, 3.0, math.nan]]
    assert parts == [pytest.approx(row, nan_ok=True) for row in want]
