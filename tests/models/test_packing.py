"""Packed rows: the layout by hand, and the values and gradients of each row alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from own_logits import assert_equal_gradients, by_the_models_own_logits
from prl_lightning.data import collate
from prl_lightning.models.causal_lm import LogprobModel
from prl_lightning.types import Rollout, RolloutBatch
from random_models import random_model

MakeRollout = Callable[[list[int], list[int]], Rollout]
# Two groups and a single row; completions of 1 token, and rows longer than a window of 4.
ROWS = [
    ([5, 14, 7], [4, 9, 1]),
    ([5, 14, 7], [8]),
    ([5, 14, 7], [3, 3, 8, 12, 11, 6, 1]),
    ([6, 13], [2, 9]),
    ([6, 13], [2, 9, 10, 1]),
    ([5, 14, 7, 3], [1]),
]


@pytest.fixture(scope="module")
def batch(make_rollout: MakeRollout) -> RolloutBatch:
    return collate([make_rollout(*row) for row in ROWS], 1, 1)


def test_a_packing_by_hand(make_rollout: MakeRollout) -> None:
    rows = [([5, 14], [4, 9, 1]), ([5, 14], [8]), ([5], [3, 2]), ([5], [7, 6])]
    packing = collate([make_rollout(*row) for row in rows], 1, 1).packing
    assert packing.input_ids.tolist() == [[5, 14, 4, 9, 5, 3, 7]]
    assert packing.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 1]]
    assert packing.predictors.tolist() == [1, 2, 3, 1, 4, 5, 4, 6]
    assert packing.targets.tolist() == [4, 9, 1, 8, 3, 2, 7, 6]
    assert packing.cells.tolist() == [0, 1, 2, 3, 6, 7, 9, 10]
    assert [block.tolist() for block in packing.blocks] == [[[0, 1, 2, 3]], [[4, 5], [4, 6]]]
    assert packing.places.tolist() == [0, 1, 2, 3, 6, 5, 7]


def test_a_single_row_and_rows_of_similar_length(make_rollout: MakeRollout) -> None:
    """A prompt is a row of its own only if no completion of its group continues it."""
    rows = [([5], [2, 3, 4, 6]), ([7, 8], [2, 3, 4]), ([9, 4], [2]), ([9, 4], [3])]
    packing = collate([make_rollout(*row) for row in rows], 1, 1).packing
    assert packing.input_ids.tolist() == [[5, 2, 3, 4, 7, 8, 2, 3, 9, 4]]
    blocks = [block.tolist() for block in packing.blocks]
    assert blocks == [[[0, 1, 2, 3], [4, 5, 6, 7]], [[8, 9]]]
    assert packing.places.tolist() == list(range(10))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("qwen2", {}), ("llama", {}), ("qwen3", {}), ("qwen3_moe", {}),
        ("mistral", {"sliding_window": 4}), ("gemma3_text", {"sliding_window": 4}),
        # Padded, because its layers do not pass the packing on.
        ("nemotron", {}),
        # Padded, because they mix tokens outside of attention.
        ("lfm2", {"layer_types": ["conv", "full_attention"]}),
        ("mamba2", {"num_heads": 4, "state_size": 4, "n_groups": 1}),
    ],
)  # fmt: skip
def test_rows_score_as_each_row_alone(
    batch: RolloutBatch, kind: str, settings: dict[str, Any]
) -> None:
    """Values, and the gradient of every parameter."""
    alone, ours = random_model(kind, **settings), LogprobModel(random_model(kind, **settings))
    assert ours.is_packed == (kind not in ("nemotron", "lfm2", "mamba2"))
    expected = torch.cat([by_the_models_own_logits(alone, *row)[0] for row in ROWS])
    logprobs = ours(batch)[0][batch.completion_mask]
    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=1e-5)
    weights = torch.randn(len(expected), generator=torch.Generator().manual_seed(1))
    (weights * logprobs).sum().backward()
    (weights * expected).sum().backward()
    assert_equal_gradients(ours.causal_lm, alone)


@pytest.mark.parametrize("kind", ["qwen2", "mistral"])
def test_float32_on_a_gpu_has_no_grouped_heads(
    batch: RolloutBatch, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its kernels do not support them; the values are the same."""
    model = LogprobModel(random_model(kind))
    grouped: list[bool] = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def noted(*args: Any, **kwargs: Any) -> Tensor:
        grouped.append(kwargs.get("enable_gqa", False) or args[0].shape[1] != args[1].shape[1])
        return attention(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    expected = model(batch)[0]
    assert set(grouped) == {True}
    grouped.clear()
    monkeypatch.setattr(Tensor, "is_cuda", True)
    torch.testing.assert_close(model(batch)[0], expected, atol=1e-5, rtol=1e-5)
    assert set(grouped) == {False}


def test_a_window_hides_tokens_outside_of_it(batch: RolloutBatch) -> None:
    """The test above would pass if both sides ignored the window."""
    windowed, whole = (
        LogprobModel(random_model("mistral", sliding_window=size))(batch)[0] for size in (4, None)
    )
    differs = (windowed - whole).abs() > 1e-4
    # The token at place p of its row is predicted by the one before, which then sees four.
    assert differs[2].tolist() == [False, False, True, True, True, True, True]
    assert not differs[[1, 3, 5]].any()


def test_padding_repeated_prompts_and_last_tokens_are_not_computed(batch: RolloutBatch) -> None:
    model = LogprobModel(random_model("qwen2"))
    computed: list[int] = []
    for block in model.blocks():
        block.mlp.register_forward_hook(lambda _, args, out: computed.append(args[0].shape[1]))
    model(batch)
    prompts, completions = 3 + 2 + 4, 3 + 1 + 7 + 2 + 4 + 1
    assert computed == [prompts + completions - len(ROWS)] * 2
