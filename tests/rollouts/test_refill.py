"""Which groups an iteration trains on: the rule as a slow loop, on any number of ranks."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from prl_lightning.rollouts import refill
from prl_lightning.rollouts.refill import IterationGroups, choose, needed, round_size
from prl_lightning.types import Completion, Prompt, Rollout

G = 2
Signal = Callable[[int], bool]


class Outcome(NamedTuple):
    updates: list[list[int]]  # positions of each update, over all ranks
    position: int
    passed: list[int]
    sampled: int
    metrics: dict[str, float]


def by_the_rule(
    has_signal: Signal, start: int, wanted: int, attempts: int
) -> tuple[list[int], int]:
    """The slow loop: one prompt after the other."""
    kept: list[int] = []
    spare: list[int] = []
    position = start
    while len(kept) < wanted and position < start + attempts * wanted:
        (kept if has_signal(position) else spare).append(position)
        position += 1
    return sorted(kept + spare[: wanted - len(kept)]), position


class Ranks:
    """Ranks as threads that meet in ``all_gather``."""

    def __init__(self, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.number = number
        self.barrier = threading.Barrier(number, timeout=60)
        self.box: list[Any] = [None] * number
        self.local = threading.local()
        monkeypatch.setattr(refill, "all_gather", self.all_gather)

    def all_gather(self, value: Any) -> list[Any]:
        self.box[self.local.rank] = value
        self.barrier.wait()
        found = list(self.box)
        self.barrier.wait()
        return found

    def run(self, function: Callable[[int], Any]) -> list[Any]:
        def on_rank(rank: int) -> Any:
            self.local.rank = rank
            return function(rank)

        with ThreadPoolExecutor(self.number) as pool:
            return list(pool.map(on_rank, range(self.number)))


def iterate(
    ranks: Ranks, has_signal: Signal, start: int, wanted: int, attempts: int, updates: int
) -> Outcome:
    """One iteration, whose prompts have their position as the seed."""

    def on_rank(rank: int) -> tuple[IterationGroups, list[int]]:
        data: Any = SimpleNamespace(
            prompts_per_epoch=wanted,
            updates_per_epoch=updates,
            rank=rank,
            ranks=ranks.number,
            positions=lambda attempts: list(range(start, start + attempts * wanted)),
            prompts_at=lambda positions: [Prompt([1], "", seed=p) for p in positions],
        )
        groups = IterationGroups(data, attempts)
        while prompts := groups.next_prompts():
            assert len(set(ranks.all_gather(len(prompts)))) == 1  # no rank waits for another
            assert len(prompts) * ranks.number <= wanted
            groups.add(list(_rollouts(prompts, has_signal)))
        chosen = [rollout.prompt.seed for rollout in groups.chosen()]
        assert chosen[::G] == chosen[1::G]  # groups stay whole
        return groups, chosen[::G]

    found = ranks.run(on_rank)
    share = wanted // updates // ranks.number
    by_update = [
        [p for _, own in found for p in own[update * share : (update + 1) * share]]
        for update in range(updates)
    ]
    passed = [rollout.prompt.seed for groups, _ in found for rollout in groups.passed][::G]
    assert len({groups.position for groups, _ in found}) == 1
    assert all(groups.metrics() == found[0][0].metrics() for groups, _ in found)
    first = found[0][0]
    sampled = sum(len(groups.sampled) // G for groups, _ in found)
    return Outcome(by_update, first.position, sorted(passed), sampled, first.metrics())


def _rollouts(prompts: list[Prompt], has_signal: Signal) -> Iterator[Rollout]:
    for prompt in prompts:
        for sample in range(G):
            reward = float(has_signal(prompt.seed) and sample == 0)
            yield Rollout(prompt, Completion([1], [0.0], True), "", reward=reward)


@pytest.mark.parametrize("number", [1, 2, 4])
@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_the_prompts_are_those_of_the_slow_loop(
    number: int, updates: int, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks, wanted, start = Ranks(number, monkeypatch), 8, 3
    for attempts in (1, 2, 5):
        draw = random.Random(f"{share} {attempts}")
        signals = [draw.random() < share for _ in range(start + attempts * wanted)]
        kept, position = by_the_rule(signals.__getitem__, start, wanted, attempts)
        found = iterate(ranks, signals.__getitem__, start, wanted, attempts, updates)
        size = wanted // updates
        assert found.updates == [kept[i * size : (i + 1) * size] for i in range(updates)]
        assert found.position == position
        assert found.passed == list(range(start, position))
        unfilled = sum(not signals[p] for p in kept)
        assert found.metrics == ({} if attempts == 1 else {
            "refill_attempts": (position - start) / wanted,
            "refill_discarded": pytest.approx(1 - wanted / found.sampled),
            "refill_unfilled": unfilled / wanted,
        })  # fmt: skip


def test_groups_of_a_round_that_are_not_needed_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """0 has a signal, 1 not; so the second round has two prompts, and 2 has one."""
    found = iterate(Ranks(1, monkeypatch), lambda position: position != 1, 0, 2, 4, 1)
    assert found.updates == [[0, 2]]
    assert (found.sampled, found.position, found.passed) == (4, 3, [0, 1, 2])


def test_the_rule_by_hand() -> None:
    signals = [False, True, False, True, True]
    assert (choose(signals, 2), needed(signals, 2)) == ([1, 3], 4)
    assert (choose(signals, 4), needed(signals, 4)) == ([0, 1, 3, 4], 5)


@pytest.mark.parametrize(
    ("found", "sampled", "ranks", "size"),
    [
        (0, 0, 1, 8),  # nothing is known yet
        (0, 8, 1, 8),
        (4, 8, 1, 8),  # 4 missing, at one half
        (6, 8, 1, 3),  # 2 missing, at three quarters: 2.67
        (6, 8, 4, 4),
        (7, 20, 1, 3),  # 1 missing, at 7 of 20: 2.86
        (2, 22, 2, 2),  # what the limit leaves
        (2, 24, 1, 0),
        (8, 9, 1, 0),
    ],
)
def test_the_size_of_a_round(found: int, sampled: int, ranks: int, size: int) -> None:
    signals = [index < found for index in range(sampled)]
    assert round_size(signals, wanted=8, limit=24, ranks=ranks) == size
