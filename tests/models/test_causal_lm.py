"""LogprobModel: values, gradients and dtypes; and the names of its weights."""

from collections.abc import Callable

import pytest
import torch
from transformers import AutoModelForCausalLM

from own_logits import assert_equal_gradients, by_the_models_own_logits
from prl_lightning.data import collate
from prl_lightning.models.causal_lm import LogprobModel, named_weights
from prl_lightning.models.loading import load_policy
from prl_lightning.sampling import HFSampler
from prl_lightning.types import Rollout, RolloutBatch

MakeRollout = Callable[[list[int], list[int]], Rollout]
LORA = {"r": 2, "target_modules": "all-linear"}
ROWS = [
    ([5, 14, 7, 17], [4, 9, 1]),
    ([9], [3, 3, 8, 12, 1]),
    ([6, 13, 8, 15, 3, 17], [2]),
    ([4] * 60, [4] * 60),
]


def batch_of(make_rollout: MakeRollout, rows: list[tuple[list[int], list[int]]]) -> RolloutBatch:
    return collate([make_rollout(*row) for row in rows], update_tokens=1, update_sequences=1)


@pytest.mark.parametrize(("model", "temperature"), [("tied_model", 1.0), ("untied_model", 0.6)])
def test_forward_equals_the_models_own_logits(
    request: pytest.FixtureRequest, make_rollout: MakeRollout, model: str, temperature: float
) -> None:
    """Values and gradients of each row are those of the row alone."""
    folder = request.getfixturevalue(model)
    ours, theirs = load_policy(folder), AutoModelForCausalLM.from_pretrained(folder)
    batch = batch_of(make_rollout, ROWS)
    batch.temperature = temperature
    logprobs, entropy = ours(batch)
    weights = torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(0))
    (weights * logprobs).sum().backward()
    for row, (prompt, completion) in enumerate(ROWS):
        expected = by_the_models_own_logits(theirs, prompt, completion, temperature)
        length = len(completion)
        for found, value in zip((logprobs[row], entropy[row]), expected, strict=True):
            torch.testing.assert_close(found[:length], value, atol=1e-5, rtol=0)
            assert not found[length:].any()
        (weights[row, :length] * expected[0]).sum().backward()
    assert_equal_gradients(ours.causal_lm, theirs)


@pytest.mark.parametrize("model", ["tied_model", "untied_model"])
def test_named_weights_are_those_of_the_file_and_an_explicit_head(
    request: pytest.FixtureRequest, model: str
) -> None:
    folder = request.getfixturevalue(model)
    sent = dict(named_weights(load_policy(folder)))
    saved = AutoModelForCausalLM.from_pretrained(folder)
    parameters = dict(saved.named_parameters(remove_duplicate=False))
    assert set(sent) == set(parameters)
    assert all(torch.equal(sent[name], parameters[name]) for name in sent)
    assert torch.equal(sent["lm_head.weight"], saved.get_output_embeddings().weight)


@pytest.mark.parametrize("lora", [None, LORA])
def test_matrices_are_sent_in_the_engines_dtype(
    untied_model: str, lora: dict[str, object] | None
) -> None:
    policy = load_policy(untied_model, lora)
    whole, half = dict(named_weights(policy)), dict(named_weights(policy, torch.bfloat16))
    assert list(half) == list(whole)
    for name, tensor in whole.items():
        dtype = torch.bfloat16 if tensor.ndim > 1 else torch.float32
        assert half[name].dtype == dtype, name
        assert torch.equal(half[name], tensor.to(dtype)), name


@torch.no_grad()
def test_a_cast_to_half_precision_keeps_the_rotary_frequencies(
    untied_model: str, make_rollout: MakeRollout
) -> None:
    """``precision: bf16-true`` casts like this; the engine has the frequencies in float32."""
    long = [3 + i % 15 for i in range(1500)]
    completion = [3 + i % 13 for i in range(60)]
    batch = batch_of(make_rollout, [(long, completion)])
    policy = load_policy(untied_model)
    exact = policy(batch)[0]
    rotary = policy.causal_lm.model.rotary_emb
    frequencies = rotary.inv_freq.clone()
    ours = policy.to(torch.bfloat16)(batch)[0]
    assert {weight.dtype for weight in policy.parameters()} == {torch.bfloat16}
    assert torch.equal(rotary.inv_freq, frequencies)
    theirs = AutoModelForCausalLM.from_pretrained(untied_model, dtype=torch.bfloat16)
    expected, _ = by_the_models_own_logits(theirs, long, completion)
    torch.testing.assert_close(ours[0], expected.float(), atol=0.1, rtol=0)
    rotary.inv_freq = frequencies.bfloat16()
    rounded, error = ((x - exact).abs().mean() for x in (policy(batch)[0], ours))
    assert rounded > 2 * error


def test_buffers_move_with_the_model(untied_model: str) -> None:
    policy = load_policy(untied_model).to("meta", torch.bfloat16)
    assert {(buffer.device.type, buffer.dtype) for buffer in policy.buffers()} == {
        ("meta", torch.float32)
    }


@pytest.mark.parametrize("load", [load_policy, lambda folder: HFSampler().start(folder, 8)])
def test_cudnn_attention_is_disabled(untied_model: str, load: Callable[[str], object]) -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)
    load(untied_model)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()


def test_an_output_head_with_a_bias_is_refused(untied_model: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(untied_model)
    LogprobModel(model)
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(len(model.lm_head.weight)))
    with pytest.raises(ValueError, match=r"model\.policy.*'qwen2' has a bias"):
        LogprobModel(model)


def test_a_body_without_the_name_of_its_class(
    tied_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = load_policy(tied_model)
    body = policy.causal_lm.model
    assert policy._body() is body
    monkeypatch.setattr(type(policy.causal_lm), "base_model_prefix", "language_model")
    assert policy.causal_lm.base_model is policy.causal_lm
    assert policy._body() is body


def test_checkpointed_blocks_run_again_in_the_backward_pass_and_change_nothing(
    tied_model: str, make_rollout: MakeRollout
) -> None:
    batch = batch_of(make_rollout, ROWS)
    policies = [load_policy(tied_model, gradient_checkpointing=flag) for flag in (False, True)]
    counts = []
    for policy in policies:
        assert not any(module.training for module in policy.causal_lm.modules())
        calls: list[str] = []
        for block in policy.blocks():
            block.self_attn.register_forward_hook(lambda *_, calls=calls: calls.append("attention"))
        loss = policy(batch)[0].sum()
        calls.append("backward")
        loss.backward()
        counts.append(calls)
    assert counts[0] == ["attention"] * 2 + ["backward"]
    assert counts[1] == ["attention"] * 2 + ["backward"] + ["attention"] * 2
    assert_equal_gradients(policies[1], policies[0])


@pytest.mark.slow
def test_compiled_blocks_give_the_same_for_all_shapes_from_one_compilation(
    tied_model: str, make_rollout: MakeRollout
) -> None:
    """On two cores a compilation takes half a minute."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain, compiled = load_policy(tied_model), load_policy(tied_model, compile=True)
    for rows, length in ((2, 3), (3, 5), (5, 9), (4, 17)):
        prompts = [([5, 14, 7], [4 + (row + i) % 9 for i in range(length)]) for row in range(rows)]
        batch = batch_of(make_rollout, prompts)
        ours, theirs = compiled(batch)[0], plain(batch)[0]
        torch.testing.assert_close(ours, theirs)
        ours.sum().backward()
        theirs.sum().backward()
    assert_equal_gradients(compiled, plain)
    # One graph for each part of a block around attention, for both blocks and every shape.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4
    names, expected = ([name for name, _ in named_weights(x)] for x in (compiled, plain))
    assert names == expected
