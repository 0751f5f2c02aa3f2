"""Completions that are left out of the loss: as if they had not been sampled, however it is cut."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from prl_lightning.data import RolloutBuffer, RolloutLoader
from prl_lightning.data.loader import pack, unpack
from prl_lightning.objective import Objective
from prl_lightning.types import Completion, Prompt, Rollout
from tiny_runs import fit, metrics_of, tiny_overrides

LIMIT = 10
# Sampled tokens of each completion; the first token of each of those marked is context.
LENGTHS = [3, 1, 5, 2, 6, 4, 5, 2]
CONTEXT = [True, False, True, False, False, True, False, False]
LEFT_OUT = [False, True, True, False, False, False, True, True]
ADVANTAGES = [0.75, -1.25, 0.5, 2.0, -0.5, 1.5, -2.0, 1.0]


def rollouts() -> list[Rollout]:
    return [
        Rollout(
            Prompt([50 + i // 2], ""),
            Completion([i] * (n + c), [-1.0] * (n + c), not out, [False] * c + [True] * n),
            text=str(i),
            outcome_advantage=torch.tensor(a),
            in_loss=not out,
        )
        for i, (n, c, out, a) in enumerate(
            zip(LENGTHS, map(int, CONTEXT), LEFT_OUT, ADVANTAGES, strict=True)
        )
    ]


def loss_and_slopes(
    share: list[Rollout], micro_batches: int, objective: Objective, totals: torch.Tensor | None
) -> tuple[float, dict[str, list[float]]]:
    """Of the micro-batches of a rank: the sum of losses, and d loss / d log pi of each row."""
    buffer = RolloutBuffer(1, micro_batches)
    buffer.fill(share, totals)
    total, slopes = 0.0, {}
    for index, members in enumerate(buffer.micro_batch_rollouts):
        batch = buffer[index]
        policy = torch.zeros(batch.completion_mask.shape).double().requires_grad_()
        loss, _ = objective.loss(policy, None, batch, None)
        total += loss.item()
        (grad,) = torch.autograd.grad(loss, policy)
        slopes |= {rollout.text: grad[row].tolist() for row, rollout in enumerate(members)}
    return total, slopes


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant"])
@pytest.mark.parametrize("cut", [(1, 1), (1, 2), (1, 8), (2, 1), (2, 4)])
def test_the_totals_are_those_of_the_completions_in_the_loss(
    aggregation: str, cut: tuple[int, int]
) -> None:
    """Over ranks and micro-batches; some micro-batches have no token."""
    ranks, micro_batches = cut
    limit = LIMIT if aggregation == "constant" else None
    objective = Objective(kl="none", aggregation=aggregation, max_length=limit)
    kept = [i for i, out in enumerate(LEFT_OUT) if not out]
    tokens = sum(LENGTHS[i] for i in kept)
    share = {
        "token_mean": lambda i: 1 / tokens,
        "sequence_mean": lambda i: 1 / (len(kept) * LENGTHS[i]),
        "constant": lambda i: 1 / (len(kept) * LIMIT),
    }[aggregation]
    everyone = rollouts()
    size = len(everyone) // ranks
    parts = [everyone[rank * size : (rank + 1) * size] for rank in range(ranks)]
    totals = None if ranks == 1 else torch.tensor([[tokens, len(kept)]])
    losses, slopes = 0.0, {}
    for part in parts:
        loss, own = loss_and_slopes(part, micro_batches, objective, totals)
        losses, slopes = losses + loss, slopes | own
    assert losses == pytest.approx(-sum(LENGTHS[i] * share(i) * ADVANTAGES[i] for i in kept))
    for i, length in enumerate(LENGTHS):
        slope = 0.0 if LEFT_OUT[i] else -share(i) * ADVANTAGES[i]
        row = [0.0] * CONTEXT[i] + [slope] * length
        assert slopes[str(i)][: len(row)] == pytest.approx(row)
        assert not any(slopes[str(i)][len(row) :])


def test_an_update_of_truncated_completions_has_a_loss_of_zero() -> None:
    share = [replace(rollout, in_loss=False) for rollout in rollouts()]
    loss, slopes = loss_and_slopes(share, 2, Objective(kl="none"), None)
    assert loss == 0
    assert not any(any(row) for row in slopes.values())


def test_a_resumed_epoch_leaves_out_the_same_completions() -> None:
    """Of another number of ranks, too: the totals are counted again."""
    everyone = rollouts()
    assert [r.in_loss for r in unpack(pack(everyone))] == [not out for out in LEFT_OUT]
    state = {"position": 0, "updates": 1, "micro_batches": 1}
    buffer = RolloutBuffer(1, 1)
    loader = RolloutLoader(buffer, rank=1, ranks=2)
    loader.load_state_dict(state | {"shares": [pack(everyone)]})
    batch = buffer[0]
    assert (batch.update_tokens, batch.update_sequences) == (3 + 2 + 6 + 4, 4)
    assert batch.completion_mask.any(1).tolist() == [True, True, False, False]


@pytest.mark.process
@pytest.mark.parametrize("limit", [1, 8])
def test_a_run_without_its_truncated_completions(
    limit: int, tied_model: str, tmp_path: Path
) -> None:
    """With a limit of 1 nothing is left to learn from; the run goes on."""
    overrides = [*tiny_overrides(tied_model, tmp_path), f"--rollout.max_new_tokens={limit}"]
    fit(*overrides, "--model.objective.mask_truncated=true")
    metrics = metrics_of(tmp_path)
    assert metrics["train/skipped_updates"] == [0.0, 0.0]
    finished = [share < 1 for share in metrics["rollout/cut_at_limit"]]
    assert finished == [limit > 1] * 2
    assert [loss != 0 for loss in metrics["train/loss"]] == finished
