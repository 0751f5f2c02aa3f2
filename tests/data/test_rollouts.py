import warnings
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import MakeRollout
from prl_lightning.data import RolloutBuffer, RolloutLoader, collate
from prl_lightning.data.rollouts import MicroBatches, split_by_tokens
from prl_lightning.types import Completion, Prompt, Rollout

LENGTHS = st.integers(1, 30)
GROUPS = st.lists(st.tuples(LENGTHS, st.lists(LENGTHS, min_size=1, max_size=4)), min_size=1)


# split_by_tokens


@st.composite
def rollouts_and_parts(draw: st.DrawFn, max_rows: int) -> tuple[list[Rollout], int]:
    rollouts = []
    for prompt_length, lengths in draw(GROUPS):
        prompt = Prompt([5] * prompt_length, "")
        rollouts += [Rollout(prompt, Completion([3] * n, [0.0] * n, True), "") for n in lengths]
    rollouts = rollouts[:max_rows]
    return rollouts, draw(st.integers(1, len(rollouts)))


def packed_tokens(rollouts: list[Rollout]) -> int:
    before = [None, *(r.prompt for r in rollouts)]
    new = [r.prompt for r, last in zip(rollouts, before, strict=False) if r.prompt != last]
    tokens = sum(len(prompt.token_ids) for prompt in new)
    return tokens + sum(len(r.completion.token_ids) for r in rollouts)


@settings(deadline=None)
@given(rollouts_and_parts(max_rows=40))
def test_rollouts_are_partitioned_into_so_many_parts(case: tuple[list[Rollout], int]) -> None:
    rollouts, parts = case
    chunks = split_by_tokens(rollouts, parts)
    assert len(chunks) == parts
    assert all(chunks)
    assert [id(r) for chunk in chunks for r in chunk] == [id(r) for r in rollouts]


@settings(deadline=None)
@given(rollouts_and_parts(max_rows=8))
def test_the_largest_part_has_the_fewest_tokens_that_the_order_allows(
    case: tuple[list[Rollout], int],
) -> None:
    rollouts, parts = case
    best = min(
        max(
            packed_tokens(rollouts[start:end])
            for start, end in zip((0, *cuts), (*cuts, len(rollouts)), strict=True)
        )
        for count in range(parts)
        for cuts in combinations(range(1, len(rollouts)), count)
    )
    assert max(map(packed_tokens, split_by_tokens(rollouts, parts))) == best


# MicroBatches


@settings(deadline=None)
@given(rollouts_and_parts(max_rows=8), st.integers(1, 80))
def test_there_are_as_few_micro_batches_as_their_tokens_allow(
    case: tuple[list[Rollout], int], tokens: int
) -> None:
    rollouts, most = case
    allowed = [
        parts
        for parts in range(1, most)
        if max(map(packed_tokens, split_by_tokens(rollouts, parts))) <= tokens
    ]
    with warnings.catch_warnings(action="ignore"):
        chunks = MicroBatches(most, tokens).cut(rollouts)
    longest = max(packed_tokens([rollout]) for rollout in rollouts)
    if tokens >= longest:
        assert chunks == split_by_tokens(rollouts, min(allowed, default=most))
    assert [id(r) for chunk in chunks for r in chunk] == [id(r) for r in rollouts]


def test_more_tokens_than_wished_are_said(make_rollout: MakeRollout) -> None:
    rollouts = [make_rollout([5], [1] * 9) for _ in range(6)]  # 1 + 6 * 9 tokens
    with pytest.warns(UserWarning, match=r"tokens=20 .* take 3 .*grad_batches allows 2\. Raise"):
        chunks = MicroBatches(2, 20).cut(rollouts)
    assert [len(chunk) for chunk in chunks] == [3, 3]


def test_a_rank_cuts_as_often_as_the_one_that_needs_it_most(
    make_rollout: MakeRollout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prl_lightning.data.rollouts.max_over_ranks", lambda own: max(own, 3))
    chunks = MicroBatches(4, 20).cut([make_rollout([5], [1, 1]) for _ in range(4)])
    assert [len(chunk) for chunk in chunks] == [1, 1, 2]


# collate


def example() -> list[Rollout]:
    return [
        Rollout(
            Prompt([7, 8, 9], "p"),
            Completion([3, 1], [-0.5, -0.25], finished=True),
            text="x",
            temperature=0.5,
            reward=1.0,
            outcome_advantage=torch.tensor(0.75),
            old_logprobs=torch.tensor([-0.5, -0.125]),
        ),
        Rollout(
            Prompt([6], "q"),
            Completion([4, 5, 2], [-1.0, -2.0, -3.0], False, [True, False, True]),
            text="y",
            temperature=0.5,
            reward=-2.0,
            outcome_advantage=torch.tensor(-0.75),
            old_logprobs=torch.tensor([-1.0, -2.0, -4.0]),
            ref_logprobs=torch.tensor([-1.5, -2.5, -3.5]),
            answer=1,
        ),
    ]


def test_a_batch_by_hand() -> None:
    batch = collate(example(), update_tokens=50, update_sequences=20)
    found = {
        name: value.tolist() if isinstance(value, torch.Tensor) else value
        for name, value in vars(batch).items()
        if name != "packing"
    }
    assert found == {
        "input_ids": [[7, 8, 9, 3, 1], [6, 4, 5, 2, 0]],
        "prompt_lengths": [3, 1],
        "completion_ids": [[3, 1, 0], [4, 5, 2]],
        "completion_lengths": [2, 3],
        "completion_mask": [[True, True, False], [True, False, True]],
        "temperature": 0.5,
        "rollout_logprobs": [[-0.5, -0.25, 0.0], [-1.0, -2.0, -3.0]],
        "rewards": [1.0, -2.0],
        "finished": [True, False],
        "outcome_advantages": [0.75, -0.75],
        "old_logprobs": [[-0.5, -0.125, 0.0], [-1.0, -2.0, -4.0]],
        # Only one of the two rollouts has these.
        "ref_logprobs": None,
        "answers": None,
        "update_tokens": 50,
        "update_sequences": 20,
        "is_padding": False,
    }


def test_padding_prompts_answers_and_advantages_per_token() -> None:
    first, second = example()
    first.outcome_advantage = torch.tensor([0.5, 0.25])
    second.outcome_advantage = torch.tensor([1.0, 2.0, 3.0])
    padding = replace(first, prompt=replace(first.prompt, is_padding=True), answer=0)
    mixed = collate([padding, second], 5, 2)
    assert mixed.outcome_advantages.tolist() == [[0.5, 0.25, 0.0], [1.0, 2.0, 3.0]]
    assert mixed.answers is not None
    assert mixed.answers.tolist() == [0, 1]
    assert not mixed.is_padding
    assert collate([padding, padding], 1, 1).is_padding


def test_a_batch_moves_with_all_its_tensors() -> None:
    batch = collate(example(), 50, 20)
    moved = batch.to("meta")
    for name, value in vars(batch).items():
        other = getattr(moved, name)
        if isinstance(value, torch.Tensor):
            assert (value.device.type, other.device.type) == ("cpu", "meta"), name
        elif name != "packing":
            assert value == other, name
    for name, value in vars(moved.packing).items():
        values = value if isinstance(value, list) else [value]
        assert all(tensor.device.type == "meta" for tensor in values), name
    assert moved.num_tokens == batch.num_tokens == int(batch.completion_mask.sum())
    assert batch.to("cpu").rewards.tolist() == [1.0, -2.0]


# RolloutBuffer


def epoch(make_rollout: MakeRollout) -> list[Rollout]:
    """Two updates of four completions; each token of a completion is the completion's length."""
    return [make_rollout([50], [length] * length) for length in range(1, 9)]


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_micro_batches_follow_the_order_of_the_updates(
    make_rollout: MakeRollout, micro_batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer = RolloutBuffer(2, micro_batches)
    assert len(buffer) == 2 * micro_batches  # before it is filled
    with pytest.raises(RuntimeError, match=r"prl_lightning\.callbacks\.RolloutCallback"):
        buffer[0]
    buffer.fill(epoch(make_rollout)[::-1])
    other_rank = torch.tensor([[100, 4], [200, 4]])
    monkeypatch.setattr(
        "prl_lightning.data.rollouts.sum_over_ranks", lambda totals: totals + other_rank
    )
    buffer.fill(epoch(make_rollout))  # replaces everything
    batches = [buffer[index] for index in range(len(buffer))]
    for update, (lengths, tokens) in enumerate([([1, 2, 3, 4], 110), ([5, 6, 7, 8], 226)]):
        own = batches[update * micro_batches : (update + 1) * micro_batches]
        assert [row[0] for batch in own for row in batch.completion_ids.tolist()] == lengths
        assert {(batch.update_tokens, batch.update_sequences) for batch in own} == {(tokens, 8)}


def test_empty_micro_batches_come_before_those_of_their_update(make_rollout: MakeRollout) -> None:
    """A completion is a prompt of 1 token and 1 to 4, or 5 to 8; the limit is 14 tokens."""
    buffer = RolloutBuffer(2, 4, micro_batch_tokens=14)
    buffer.fill(epoch(make_rollout))
    assert len(buffer) == 8
    lengths = [batch and batch.completion_lengths.tolist() for batch in RolloutLoader(buffer)]
    assert lengths == [None, None, None, [1, 2, 3, 4], None, [5, 6], [7], [8]]
    assert buffer.metrics() == {"micro_batches": 2.0}
    assert RolloutBuffer(2, 4).metrics() == {}
