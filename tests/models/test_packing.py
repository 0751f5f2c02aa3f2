from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from own_logits import by_the_models_own_logits
from prl_lightning.data import collate
from prl_lightning.models.causal_lm import LogprobModel
from prl_lightning.types import Rollout, RolloutBatch

MakeRollout = Callable[[list[int], list[int]], Rollout]
SIZES: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "initializer_range": 0.3,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
# Two groups and a lone row; completions of 1 token, and rows longer than a window of 4.
ROWS = [
    ([5, 14, 7], [4, 9, 1]),
    ([5, 14, 7], [8]),
    ([5, 14, 7], [3, 3, 8, 12, 11, 6, 1]),
    ([6, 13], [2, 9]),
    ([6, 13], [2, 9, 10, 1]),
    ([5, 14, 7, 3], [1]),
]


@pytest.fixture
def batch(make_rollout: MakeRollout) -> RolloutBatch:
    return collate([make_rollout(*row) for row in ROWS], 1, 1)


def model_of(config: PretrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(deepcopy(config)).eval()


def each_alone(model: PreTrainedModel) -> Tensor:
    return torch.cat([by_the_models_own_logits(model, *row)[0] for row in ROWS])


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


def test_a_row_alone_and_rows_of_similar_length(make_rollout: MakeRollout) -> None:
    """A prompt is a row of its own only if no completion of its group goes on from it."""
    rows = [([5], [2, 3, 4, 6]), ([7, 8], [2, 3, 4]), ([9, 4], [2]), ([9, 4], [3])]
    packing = collate([make_rollout(*row) for row in rows], 1, 1).packing
    assert packing.input_ids.tolist() == [[5, 2, 3, 4, 7, 8, 2, 3, 9, 4]]
    blocks = [block.tolist() for block in packing.blocks]
    assert blocks == [[[0, 1, 2, 3], [4, 5, 6, 7]], [[8, 9]]]
    assert packing.places.tolist() == list(range(10))


@pytest.mark.parametrize(
    "config",
    [
        AutoConfig.for_model("qwen2", **SIZES),
        AutoConfig.for_model("llama", **SIZES),
        AutoConfig.for_model("qwen3", **SIZES),
        AutoConfig.for_model("qwen3_moe", **SIZES, **EXPERTS),
        MistralConfig(**SIZES, sliding_window=4),
        AutoConfig.for_model("gemma3_text", **SIZES, sliding_window=4),
    ],
    ids=lambda config: config.model_type,
)
def test_packed_rows_score_as_each_row_alone(batch: RolloutBatch, config: PretrainedConfig) -> None:
    """Values, and the gradient of every parameter; with a window shorter than the rows as well."""
    alone, ours = model_of(config), LogprobModel(model_of(config))
    assert ours.is_packed
    expected, mask = each_alone(alone), batch.completion_mask
    logprobs = ours(batch)[0][mask]
    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=1e-5)
    weights = torch.randn(len(expected), generator=torch.Generator().manual_seed(1))
    (weights * logprobs).sum().backward()
    (weights * expected).sum().backward()
    gradients = dict(alone.named_parameters())
    for name, parameter in ours.causal_lm.named_parameters():
        torch.testing.assert_close(
            parameter.grad, gradients[name].grad, atol=1e-4, rtol=1e-4, msg=name
        )


@pytest.mark.parametrize("kind", ["qwen2", "mistral"])
def test_every_head_has_its_keys_where_a_kernel_knows_no_groups(
    batch: RolloutBatch, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU in float32: no product of all rows is made, and the values are the same."""
    model = LogprobModel(model_of(AutoConfig.for_model(kind, **SIZES)))
    expected = model(batch)[0]
    grouped: list[bool] = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def noted(*args: Any, **kwargs: Any) -> Tensor:
        grouped.append(kwargs.get("enable_gqa", False) or args[0].shape[1] != args[1].shape[1])
        return attention(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    model(batch)
    assert all(grouped)
    grouped.clear()
    monkeypatch.setattr(Tensor, "is_cuda", True)
    torch.testing.assert_close(model(batch)[0], expected, atol=1e-6, rtol=1e-6)
    assert grouped
    assert not any(grouped)


def test_a_window_hides_what_is_farther_away(batch: RolloutBatch) -> None:
    """The test above would pass if both sides forgot the window."""
    config = MistralConfig(**SIZES, sliding_window=4)
    windowed = LogprobModel(model_of(config))(batch)[0]
    config.sliding_window = None
    whole = LogprobModel(model_of(config))(batch)[0]
    differs = (windowed - whole).abs() > 1e-4
    # A token at place p of its row is predicted by the one before it, which then sees only four.
    assert differs[2].tolist() == [False, False, True, True, True, True, True]
    assert not differs[[1, 3, 5]].any()


def test_neither_padding_nor_a_prompt_again_nor_last_tokens_are_computed(
    batch: RolloutBatch,
) -> None:
    model = LogprobModel(model_of(AutoConfig.for_model("qwen2", **SIZES)))
    computed: list[int] = []
    for block in model.blocks():
        block.mlp.register_forward_hook(lambda _, args, out: computed.append(args[0].shape[1]))
    model(batch)
    prompts, completions = 3 + 2 + 4, 3 + 1 + 7 + 2 + 4 + 1
    assert computed == [prompts + completions - len(ROWS)] * 2


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("lfm2", {"layer_types": ["conv", "full_attention"]}),
        ("mamba2", {"num_heads": 4, "head_dim": 8, "state_size": 4, "n_groups": 1}),
    ],
)
def test_architectures_with_other_mixers_are_scored_in_padded_rows(
    batch: RolloutBatch, kind: str, settings: dict[str, Any]
) -> None:
    config = AutoConfig.for_model(kind, **SIZES | settings)
    alone, ours = model_of(config), LogprobModel(model_of(config))
    assert not ours.is_packed
    logprobs = ours(batch)[0][batch.completion_mask]
    torch.testing.assert_close(logprobs, each_alone(alone), atol=1e-4, rtol=1e-4)
