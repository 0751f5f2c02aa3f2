import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

from own_logits import by_the_models_own_logits
from prl_lightning.arithmetic import make_tokenizer
from prl_lightning.data import collate
from prl_lightning.models.causal_lm import LogprobModel, named_weights
from prl_lightning.models.loading import (
    load_causal_lm,
    load_policy,
    load_tokenizer,
    max_model_tokens,
    stop_token_ids,
)
from prl_lightning.sampling import HFSampler
from prl_lightning.types import Rollout, RolloutBatch

MakeRollout = Callable[[list[int], list[int]], Rollout]
ROWS = [([5, 14, 7, 17], [4, 9, 1]), ([9], [3, 3, 8, 12, 1]), ([6, 13, 8, 15, 3, 17], [2])]


def batch_of(make_rollout: MakeRollout, rows: list[tuple[list[int], list[int]]]) -> RolloutBatch:
    return collate([make_rollout(*row) for row in rows], update_tokens=1, update_sequences=1)


@pytest.mark.parametrize("model", ["tied_model", "untied_model"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_forward_equals_the_models_own_logits(
    request: pytest.FixtureRequest, make_rollout: MakeRollout, model: str, temperature: float
) -> None:
    """Values and the gradient of every parameter."""
    folder = request.getfixturevalue(model)
    ours = LogprobModel(load_causal_lm(folder))
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    batch = batch_of(make_rollout, ROWS)
    batch.temperature = temperature
    logprobs, entropy = ours(batch)
    weights = torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(0))
    (weights * logprobs).sum().backward()
    total = torch.zeros(())
    for row, (prompt, completion) in enumerate(ROWS):
        expected, expected_entropy = by_the_models_own_logits(
            theirs, prompt, completion, temperature
        )
        length = len(completion)
        torch.testing.assert_close(logprobs[row, :length], expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(entropy[row, :length], expected_entropy, atol=1e-5, rtol=0)
        assert not logprobs[row, length:].any()
        assert not entropy[row, length:].any()
        total = total + (weights[row, :length] * expected).sum()
    total.backward()
    expected_gradients = dict(theirs.named_parameters())
    for name, parameter in ours.causal_lm.named_parameters():
        torch.testing.assert_close(
            parameter.grad, expected_gradients[name].grad, atol=1e-4, rtol=1e-4, msg=name
        )


@torch.no_grad()
def test_padding_and_neighbours_change_nothing(tied_model: str, make_rollout: MakeRollout) -> None:
    model = LogprobModel(load_causal_lm(tied_model))
    together, _ = model(batch_of(make_rollout, [*ROWS, ([4] * 60, [4] * 60)]))
    for row, (prompt, completion) in enumerate(ROWS):
        alone, _ = model(batch_of(make_rollout, [(prompt, completion)]))
        torch.testing.assert_close(together[row, : len(completion)], alone[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("model", ["tied_model", "untied_model"])
def test_named_weights_are_those_of_the_file_and_an_explicit_head(
    request: pytest.FixtureRequest, model: str
) -> None:
    folder = request.getfixturevalue(model)
    sent = dict(named_weights(LogprobModel(load_causal_lm(folder))))
    saved = AutoModelForCausalLM.from_pretrained(folder)
    parameters = dict(saved.named_parameters(remove_duplicate=False))
    assert set(sent) == set(parameters)
    assert all(torch.equal(sent[name], parameters[name]) for name in sent)
    assert torch.equal(sent["lm_head.weight"], saved.get_output_embeddings().weight)


@pytest.mark.parametrize("lora", [None, {"r": 2, "target_modules": "all-linear"}])
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
def test_a_cast_to_half_precision_leaves_the_positions_alone(
    untied_model: str, make_rollout: MakeRollout
) -> None:
    """As ``precision: bf16-true`` casts; the engine has its rotary frequencies in float32."""
    long = [3 + i % 15 for i in range(1500)]
    completion = [3 + i % 13 for i in range(60)]
    batch = batch_of(make_rollout, [(long, completion)])
    policy = LogprobModel(load_causal_lm(untied_model))
    exact = policy(batch)[0]
    frequencies = policy.causal_lm.model.rotary_emb.inv_freq.clone()
    ours = policy.to(torch.bfloat16)(batch)[0]
    assert {weight.dtype for weight in policy.parameters()} == {torch.bfloat16}
    assert torch.equal(policy.causal_lm.model.rotary_emb.inv_freq, frequencies)
    theirs = AutoModelForCausalLM.from_pretrained(untied_model, dtype=torch.bfloat16)
    expected, _ = by_the_models_own_logits(theirs, long, completion)
    torch.testing.assert_close(ours[0], expected.float(), atol=0.1, rtol=0)
    policy.causal_lm.model.rotary_emb.inv_freq = frequencies.bfloat16()
    rounded = policy(batch)[0]
    errors = [(logprobs - exact).abs().mean() for logprobs in (rounded, ours)]
    print(f"off by {errors[0]:.3f} with rounded frequencies, by {errors[1]:.3f} without")
    assert errors[0] > 2 * errors[1]


def test_buffers_move_with_the_model(untied_model: str) -> None:
    policy = LogprobModel(load_causal_lm(untied_model)).to("meta", torch.bfloat16)
    assert {buffer.device.type for buffer in policy.buffers()} == {"meta"}
    assert {buffer.dtype for buffer in policy.buffers()} == {torch.float32}


def test_attention_that_plans_for_each_shape_is_never_chosen(untied_model: str) -> None:
    for use in (
        lambda: load_policy(untied_model),
        lambda: HFSampler().start(untied_model, 8),
    ):
        torch.backends.cuda.enable_cudnn_sdp(True)
        use()
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.flash_sdp_enabled()


def test_an_architecture_that_changes_its_logits_is_named() -> None:
    config = Gemma2Config(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, head_dim=8, final_logit_softcapping=30.0,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"'gemma2'.*final_logit_softcapping=30\.0.*Use an arch"):
        LogprobModel(Gemma2ForCausalLM(config))
    config.final_logit_softcapping = None
    LogprobModel(Gemma2ForCausalLM(config))


def test_an_output_head_with_a_bias_is_an_error(untied_model: str) -> None:
    model = load_causal_lm(untied_model)
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(model.config.vocab_size))
    with pytest.raises(ValueError, match="output head with a bias"):
        LogprobModel(model)


def test_weights_are_float32_whatever_the_file_has(tied_model: str, tmp_path: Path) -> None:
    half = AutoModelForCausalLM.from_pretrained(tied_model, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").dtype == torch.bfloat16
    loaded = load_causal_lm(str(tmp_path))
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}


def test_a_body_that_is_not_where_its_class_says(
    tied_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = load_policy(tied_model)
    body = policy._body()
    assert body is policy.causal_lm.model
    monkeypatch.setattr(type(policy.causal_lm), "base_model_prefix", "language_model")
    assert policy.causal_lm.base_model is policy.causal_lm
    assert policy._body() is body


# Stop tokens and limits


def edited(model: str, folder: Path, name: str, **values: object) -> str:
    """A copy of a model's folder with some fields of one of its JSON files replaced."""
    shutil.copytree(model, folder)
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return str(folder)


@pytest.mark.parametrize(
    ("configured", "expected"), [(1, (1,)), ([7, 5], (1, 5, 7)), (4, (1, 4)), (None, (1,))]
)
def test_stop_tokens_are_the_tokenizers_and_the_generation_configs(
    tied_model: str, tmp_path: Path, configured: object, expected: tuple[int, ...]
) -> None:
    folder = edited(tied_model, tmp_path / "m", "generation_config.json", eos_token_id=configured)
    assert stop_token_ids(folder, make_tokenizer()) == expected


def test_stop_tokens_of_a_model_without_generation_config(tied_model: str, tmp_path: Path) -> None:
    folder = edited(tied_model, tmp_path / "model", "config.json", eos_token_id=6)
    (Path(folder) / "generation_config.json").unlink()
    assert stop_token_ids(folder, make_tokenizer()) == (1, 6)


def test_no_stop_token_names_the_file_to_edit(tied_model: str, tmp_path: Path) -> None:
    folder = edited(tied_model, tmp_path / "m", "generation_config.json", eos_token_id=None)
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"Set eos_token_id in its generation_config\.json"):
        stop_token_ids(folder, tokenizer)


def test_longest_row_is_the_architectures(tied_model: str, tmp_path: Path) -> None:
    folder = edited(tied_model, tmp_path / "model", "config.json", max_position_embeddings=77)
    assert max_model_tokens(folder) == 77


# Remote code


@pytest.fixture
def folder_with_code(tied_model: str, tmp_path: Path) -> tuple[str, Path]:
    """A model whose files ask for code of their own, and the file that this code would write."""
    code = {
        "AutoConfig": "custom.CustomConfig",
        "AutoModelForCausalLM": "custom.CustomModel",
        "AutoTokenizer": [None, "custom.CustomTokenizer"],
    }
    folder = edited(
        tied_model, tmp_path / "model", "config.json", model_type="custom", auto_map=code
    )
    trace = tmp_path / "executed"
    (tmp_path / "model" / "custom.py").write_text(f"open({str(trace)!r}, 'w')\n")
    return folder, trace


@pytest.mark.parametrize(
    "load",
    [
        load_causal_lm,
        max_model_tokens,
        lambda folder: HFSampler().start(folder, 8),
    ],
    ids=["load_causal_lm", "max_model_tokens", "HFSampler"],
)
def test_code_of_a_model_is_refused_without_asking(
    folder_with_code: tuple[str, Path],
    load: Callable[[str], object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By default transformers asks on the terminal, for fifteen seconds, on every rank."""
    folder, trace = folder_with_code
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda question="": asked.append(question) or "y")
    with pytest.raises(ValueError, match="trust_remote_code"):
        load(folder)
    assert not asked
    assert not trace.exists()


def test_code_of_a_tokenizer_is_not_run(
    tied_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    auto_map = {"AutoTokenizer": [None, "custom.CustomTokenizer"]}
    folder = edited(tied_model, tmp_path / "m", "tokenizer_config.json", auto_map=auto_map)
    trace = tmp_path / "executed"
    (Path(folder) / "custom.py").write_text(f"open({str(trace)!r}, 'w')\n")
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda question="": asked.append(question) or "y")
    tokenizer = load_tokenizer(folder)
    assert (
        tokenizer("3+5?")["input_ids"]
        == AutoTokenizer.from_pretrained(tied_model)("3+5?")["input_ids"]
    )
    assert not asked
    assert not trace.exists()


def test_checkpointed_blocks_run_again_in_the_backward_pass_and_change_nothing(
    tied_model: str, make_rollout: MakeRollout
) -> None:
    batch = batch_of(make_rollout, [([5, 14, 7], [4, 9, 1]), ([6], [15, 3])])
    gradients, calls = {}, {}
    for checkpointing in (False, True):
        policy = load_policy(tied_model, gradient_checkpointing=checkpointing)
        assert not any(module.training for module in policy.causal_lm.modules())
        attention = [block.self_attn for block in policy.blocks()]
        assert len(attention) == 2
        count = [0]
        for layer in attention:
            layer.register_forward_hook(lambda *_, count=count: count.__setitem__(0, count[0] + 1))
        logprobs, _ = policy(batch)
        forward = count[0]
        logprobs.sum().backward()
        calls[checkpointing] = (forward, count[0] - forward)
        gradients[checkpointing] = {n: p.grad for n, p in policy.named_parameters()}
    assert calls == {False: (2, 0), True: (2, 2)}
    for name, gradient in gradients[False].items():
        torch.testing.assert_close(gradients[True][name], gradient)


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
    for (name, our), their in zip(compiled.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(
            our.grad, their.grad, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: n + m
        )
    # The parts of a block around attention, and one graph of each for both blocks and every shape.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4
    assert names_of(compiled) == names_of(plain)


def names_of(model: LogprobModel) -> list[str]:
    return [name for name, _ in named_weights(model)]
