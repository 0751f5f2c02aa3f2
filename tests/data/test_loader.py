from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from prl_lightning.data import RolloutBuffer, RolloutLoader
from prl_lightning.data.loader import pack, unpack
from prl_lightning.types import Completion, Prompt, Rollout, RolloutBatch

UPDATES, MICRO_BATCHES, SIZE = 2, 2, 8  # rollouts per update over all ranks


def epoch(per_token: bool = False, reference: bool = True) -> list[Rollout]:
    """Two updates of different lengths, with unsampled tokens; no number is exact in float32."""
    rollouts = []
    for row in range(UPDATES * SIZE):
        length = 1 + (row * 7) % 16
        logprobs = [-0.1 * (place + row + 1) for place in range(length)]
        is_sampled = [place % 4 != 1 for place in range(length)]
        rollouts.append(
            Rollout(
                Prompt([50 + row, 51], [{"role": "user", "content": str(row)}], seed=2**61 + row),
                Completion([row] * length, logprobs, row % 3 == 0, is_sampled),
                text=f"text {row}",
                temperature=0.7,
                reward=row / 3,
                outcome_advantage=torch.randn(length) if per_token else torch.randn(()),
                old_logprobs=torch.randn(length),
                ref_logprobs=torch.randn(length) if reference else None,
            )
        )
    return rollouts


def filled(rollouts: list[Rollout], rank: int = 0, ranks: int = 1) -> RolloutLoader:
    """The loader of one of several ranks, which share each update."""
    updates = [rollouts[start : start + SIZE] for start in range(0, len(rollouts), SIZE)]
    totals = [[sum(map(sum, (r.completion.is_sampled for r in some))), SIZE] for some in updates]
    share = slice(rank * SIZE // ranks, (rank + 1) * SIZE // ranks)
    buffer = RolloutBuffer(UPDATES, MICRO_BATCHES)
    buffer.fill([r for update in updates for r in update[share]], torch.tensor(totals))
    return RolloutLoader(buffer, rank, ranks)


def saved(rollouts: list[Rollout], position: int, ranks: int, file: Path) -> dict[str, Any]:
    """The state in a checkpoint of these ranks, written to a file and read again."""
    loaders = [filled(rollouts, rank, ranks) for rank in range(ranks)]
    shares = [pack(loader.buffer.rollouts) for loader in loaders]
    alone = filled(rollouts)
    alone.buffer.position = position
    torch.save(alone.state_dict() | {"shares": shares}, file)
    return torch.load(file, weights_only=True)


def fields(batches: list[RolloutBatch]) -> list[dict[str, Any]]:
    return [vars(batch) | {"packing": vars(batch.packing)} for batch in batches]


@pytest.mark.parametrize(("per_token", "reference"), [(False, False), (True, True)])
def test_packing_drops_the_columns_alone(per_token: bool, reference: bool) -> None:
    rollouts = epoch(per_token, reference)
    answer = replace(rollouts[0].prompt, columns={"answer": object()})
    packed = pack([replace(rollouts[0], prompt=answer), *rollouts[1:]])
    for rollout, back in zip(rollouts, unpack(packed), strict=True):
        for name, value in vars(rollout).items():
            other = getattr(back, name)
            is_tensor = isinstance(value, torch.Tensor)
            assert torch.equal(value, other) if is_tensor else value == other, name


@pytest.mark.parametrize(
    ("before", "after", "position"), [(1, 1, 2), (1, 2, 0), (2, 1, 2), (2, 2, 2)]
)
def test_any_number_of_ranks_continues_with_the_remaining_micro_batches(
    before: int, after: int, position: int, tmp_path: Path
) -> None:
    rollouts = epoch()
    state = saved(rollouts, position, before, tmp_path / "state.pt")
    for rank in range(after):
        loader = RolloutLoader(RolloutBuffer(UPDATES, MICRO_BATCHES), rank, after)
        left = iter(loader)  # Lightning creates the iterator before the state is loaded
        loader.load_state_dict(state)
        batches, expected = list(left), list(filled(rollouts, rank, after))[position:]
        assert [batch.temperature for batch in batches] == [0.7] * (4 - position)
        torch.testing.assert_close(fields(batches), fields(expected), rtol=0, atol=0)


def test_micro_batches_are_cut_as_before(tmp_path: Path) -> None:
    """A group's prompt counts once: the cut is 50 | 76 tokens, not 121 | 105."""
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


def test_a_partial_update_is_repeated_and_a_finished_epoch_keeps_no_rollouts() -> None:
    loader = filled(epoch())
    loader.buffer.position = 3
    assert loader.state_dict()["position"] == 2
    assert len(list(loader)) == 1
    state = loader.state_dict()
    assert state == {"position": 4, "updates": 2, "micro_batches": 2}
    fresh = RolloutLoader(RolloutBuffer(UPDATES, MICRO_BATCHES))
    fresh.load_state_dict(state)
    assert (fresh.buffer.position, list(fresh.buffer.rollouts)) == (0, [])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((4, 2), r"data\.updates_per_epoch=4.*with 2"),
        ((2, 4), r"trainer\.accumulate_grad_batches=4.*with 2"),
    ],
)
def test_another_cut_of_the_epoch_is_an_error(sizes: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RolloutLoader(RolloutBuffer(*sizes)).load_state_dict(filled(epoch()).state_dict())
