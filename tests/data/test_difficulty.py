"""Solved prompts are drawn less often: by a slow loop, on any number of ranks, after a resume."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from prl_lightning.data import Difficulty
from prl_lightning.data.stream import PromptStream
from prl_lightning.types import Completion, Prompt, Rollout

ROWS = 40
PROMPTS = [Prompt([row], str(row)) for row in range(ROWS)]
DIFFICULTY = Difficulty(passes=2, keep=0.25)


def is_easy(source: Any) -> bool:
    return int(source) % 2 == 0


def rollouts_of(prompts: list[Prompt]) -> list[Rollout]:
    """Groups of two: an easy prompt is solved twice, another once."""
    completion = Completion([1], [0.0], True)
    return [
        Rollout(prompt, completion, "", reward=reward)
        for prompt in prompts
        for reward in (1.0, 1.0 if is_easy(prompt.source) else 0.0)
    ]


def epochs(stream: PromptStream, start: int, number: int) -> tuple[list[list[int]], int]:
    """Positions of iterations of eight prompts, and where the next one begins."""
    drawn = []
    for _ in range(number):
        positions = stream.positions(start, 8)
        stream.observe(rollouts_of([stream[position] for position in positions]), 2, 0.5)
        drawn.append(positions)
        start = positions[-1] + 1
    return drawn, start


def by_a_slow_loop(number: int, seed: int) -> list[list[int]]:
    streaks: Counter[int] = Counter()
    orders: list[list[int]] = []
    drawn: list[list[int]] = []
    position = itertools.count()
    for _ in range(number):
        drawn.append([])
        while len(drawn[-1]) < 8:
            here = next(position)
            if here // ROWS == len(orders):
                generator = torch.Generator().manual_seed(seed * 1_000_003 + len(orders))
                orders.append(torch.randperm(ROWS, generator=generator).tolist())
            row = orders[here // ROWS][here % ROWS]
            (word,) = np.random.SeedSequence((seed, 2, here)).generate_state(1, np.uint64)
            if streaks[row] < 2 or int(word) / 2**64 < 0.25:
                drawn[-1].append(here)
        for here in drawn[-1]:
            row = orders[here // ROWS][here % ROWS]
            streaks[row] = streaks[row] + 1 if row % 2 == 0 else 0
    return drawn


def test_the_positions_are_those_of_a_slow_loop() -> None:
    drawn, end = epochs(PromptStream(PROMPTS, 7, DIFFICULTY), 0, 40)
    assert drawn == by_a_slow_loop(40, 7)
    assert end > 400  # some prompts were passed over


def test_solved_prompts_are_drawn_a_quarter_as_often() -> None:
    """From the third pass on; the others are drawn in every pass."""
    stream = PromptStream(PROMPTS, 3, DIFFICULTY)
    drawn, end = epochs(stream, 0, 400)
    later = [p for positions in drawn for p in positions if p >= 2 * ROWS + 8]
    turns = (end - 2 * ROWS - 8) / 2
    easy = sum(is_easy(stream[position].source) for position in later)
    assert easy / turns == pytest.approx(0.25, abs=0.03)
    assert (len(later) - easy) / turns == pytest.approx(1.0, abs=0.03)


def test_a_prompt_that_is_forgotten_is_drawn_as_before() -> None:
    stream = PromptStream(PROMPTS, 0, DIFFICULTY)
    epochs(stream, 0, 20)
    counts = stream.solved.counts
    assert counts[0] == 2  # and no more than the limit
    prompt = next(stream[position] for position in range(ROWS) if stream.row(position) == 0)
    completion = Completion([1], [0.0], True)
    wrong = [Rollout(prompt, completion, "", reward=reward) for reward in (1.0, 0.0)]
    values = stream.observe(wrong, 2, 0.5)
    assert counts[0] == 0
    assert values == {"solved_prompts": pytest.approx(19 / 40)}


def test_a_resumed_run_draws_the_same() -> None:
    whole = PromptStream(PROMPTS, 1, DIFFICULTY)
    _, middle = epochs(whole, 0, 17)
    state = whole.state_dict()
    resumed = PromptStream(PROMPTS, 1, DIFFICULTY)
    expected = epochs(whole, middle, 10)  # which must not change the saved state
    assert epochs(PromptStream(PROMPTS, 1, DIFFICULTY), middle, 10) != expected
    resumed.load_state_dict(state)
    assert epochs(resumed, middle, 10) == expected


def test_ranks_count_each_others_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second rank's share is the other half of an iteration."""
    alone, halved = (PromptStream(PROMPTS, 5, DIFFICULTY) for _ in range(2))
    start = 0
    for _ in range(20):
        positions = alone.positions(start, 8)
        assert halved.positions(start, 8) == positions
        rollouts = rollouts_of([alone[position] for position in positions])
        alone.observe(rollouts, 2, 0.5)
        others = [
            (rollout.prompt.position, is_easy(rollout.prompt.source)) for rollout in rollouts[8::2]
        ]
        with monkeypatch.context() as patch:
            patch.setattr(
                "prl_lightning.data.difficulty.all_gather",
                lambda own, others=others: [others, own],
            )
            halved.observe(rollouts[:8], 2, 0.5)
        start = positions[-1] + 1
    assert torch.equal(alone.solved.counts, halved.solved.counts)
    assert alone.solved.counts.max() == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"passes": 0}, r"data\.difficulty\.passes=0"),
        ({"passes": 256}, r"data\.difficulty\.passes=256"),
        ({"keep": 0.0}, r"data\.difficulty\.keep=0\.0"),
        ({"keep": 1.0}, r"data\.difficulty\.keep=1\.0"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Difficulty(**options)
