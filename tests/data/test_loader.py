from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from prl_lightning.data import RolloutBuffer, RolloutLoader
from prl_lightning.data.loader import pack, unpack
from prl_lightning.models.packing import Packing
from prl_lightning.types import Completion, Prompt, Rollout, RolloutBatch

UPDATES, MICRO_BATCHES, SIZE = 2, 2, 8  # rollouts an update over all ranks


def epoch(per_token: bool = False, reference: bool = True) -> list[Rollout]:
    """Two updates; no two rollouts alike in length, and no number exact in float32."""
    rollouts = []
    for row in range(UPDATES * SIZE):
        length = 1 + (row * 7) % 16
        logprobs = [-0.1 * (place + row + 1) for place in range(length)]
        rollouts.append(
            Rollout(
                Prompt([50 + row, 51], [{"role": "user", "content": str(row)}], seed=2**61 + row),
                Completion([row] * length, logprobs, finished=row % 3 == 0),
                text=f"text {row}",
                reward=row / 3,
                outcome_advantage=torch.randn(length) if per_token else torch.randn(()),
                old_logprobs=torch.randn(length),
                ref_logprobs=torch.randn(length) if reference else None,
            )
        )
    return rollouts


def share_of(rollouts: list[Rollout], rank: int, ranks: int) -> list[Rollout]:
    share = SIZE // ranks
    starts = [update * SIZE + rank * share for update in range(UPDATES)]
    return [rollout for start in starts for rollout in rollouts[start : start + share]]


def filled(rollouts: list[Rollout], rank: int = 0, ranks: int = 1) -> RolloutLoader:
    buffer = RolloutBuffer(UPDATES, MICRO_BATCHES)
    updates = [rollouts[start : start + SIZE] for start in range(0, len(rollouts), SIZE)]
    totals = [[sum(len(r.completion.token_ids) for r in some), SIZE] for some in updates]
    buffer.fill(share_of(rollouts, rank, ranks), lambda _: torch.tensor(totals))
    return RolloutLoader(buffer, rank, ranks)


def saved(rollouts: list[Rollout], position: int, ranks: int, file: Path) -> dict[str, Any]:
    """What a checkpoint of these ranks would hold, through a file."""
    loaders = [filled(rollouts, rank, ranks) for rank in range(ranks)]
    shares = [pack(loader.buffer.rollouts) for loader in loaders]
    alone = filled(rollouts)
    alone.buffer.position = position
    torch.save(alone.state_dict() | {"shares": shares}, file)
    return torch.load(file, weights_only=True)


def assert_same(one: list[RolloutBatch], other: list[RolloutBatch]) -> None:
    assert len(one) == len(other)
    for first, second in zip(one, other, strict=True):
        assert len(vars(first)) > 10
        for name, mine in vars(first).items():
            theirs = vars(second)[name]
            assert len(tensors(mine)) == len(tensors(theirs)), name
            assert all(map(torch.equal, tensors(mine), tensors(theirs))), name
            assert tensors(mine) or mine == theirs, name


def tensors(value: Any) -> list[torch.Tensor]:
    """Those of a tensor or a Packing."""
    found: list[torch.Tensor] = []
    if isinstance(value, Packing):
        value.map(lambda tensor: (found.append(tensor), tensor)[1])
    return [value] if isinstance(value, torch.Tensor) else found


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("reference", [False, True])
def test_packing_loses_nothing_but_the_columns(per_token: bool, reference: bool) -> None:
    rollouts = epoch(per_token, reference)
    for rollout, back in zip(rollouts, unpack(pack(rollouts)), strict=True):
        for name in ("prompt", "completion", "text", "reward"):
            assert getattr(back, name) == getattr(rollout, name)
        for name in ("outcome_advantage", "old_logprobs", "ref_logprobs"):
            mine, theirs = getattr(rollout, name), getattr(back, name)
            assert mine is theirs is None or torch.equal(mine, theirs)
    with_columns = replace(rollouts[0].prompt, columns={"answer": object()})
    (back,) = unpack(pack([replace(rollouts[0], prompt=with_columns)]))
    assert back.prompt.columns == {}


@pytest.mark.parametrize("before", [1, 2])
@pytest.mark.parametrize("after", [1, 2])
@pytest.mark.parametrize("position", [0, 2])
def test_any_number_of_ranks_goes_on_with_the_micro_batches_that_are_left(
    before: int, after: int, position: int, tmp_path: Path
) -> None:
    rollouts = epoch()
    state = saved(rollouts, position, before, tmp_path / "state.pt")
    for rank in range(after):
        loader = RolloutLoader(RolloutBuffer(UPDATES, MICRO_BATCHES), rank, after)
        left = iter(loader)  # Lightning takes the iterator before anything is there
        loader.load_state_dict(state)
        assert_same(list(left), list(filled(rollouts, rank, after))[position:])


def test_groups_are_cut_as_they_were(tmp_path: Path) -> None:
    """The prompt of a group counts once: the cut is 50 | 76 tokens, and would be 121 | 105."""
    prompts = [Prompt([0] * 20, str(seed), seed=seed) for seed in range(4)]
    lengths = [30, 30, 1, 1, 1, 1, 1, 1] * UPDATES
    rollouts = [
        Rollout(prompts[row // 4], Completion([1] * length, [-1.0] * length, True), "")
        for row, length in enumerate(lengths)
    ]
    again = RolloutLoader(RolloutBuffer(UPDATES, MICRO_BATCHES))
    again.load_state_dict(saved(rollouts, 0, 1, tmp_path / "state.pt"))
    for loader in (filled(rollouts), again):
        assert [len(chunk) for chunk in loader.buffer.micro_batch_rollouts] == [1, 7, 1, 7]


def test_an_update_that_is_under_way_begins_again() -> None:
    loader = filled(epoch())
    for _ in zip(range(3), loader, strict=False):
        pass
    assert loader.buffer.position in (3, 4)
    loader.buffer.position = 3
    assert loader.state_dict()["position"] == 2


def test_an_epoch_that_is_over_keeps_no_rollouts() -> None:
    loader = filled(epoch())
    assert len(list(loader)) == 4
    state = loader.state_dict()
    assert state == {"position": 4, "updates": 2, "micro_batches": 2}
    fresh = RolloutLoader(RolloutBuffer(UPDATES, MICRO_BATCHES))
    fresh.load_state_dict(state)
    assert fresh.buffer.position == 0
    assert list(fresh.buffer.rollouts) == []


@pytest.mark.parametrize(
    ("buffer", "name"),
    [
        (RolloutBuffer(4, 2), r"data\.updates_per_epoch=4.*with 2"),
        (RolloutBuffer(2, 4), r"trainer\.accumulate_grad_batches=4.*with 2"),
    ],
)
def test_another_cut_of_the_epoch_is_an_error(
    buffer: RolloutBuffer, name: str, tmp_path: Path
) -> None:
    state = saved(epoch(), 2, 1, tmp_path / "state.pt")
    with pytest.raises(ValueError, match=name):
        RolloutLoader(buffer).load_state_dict(state)
