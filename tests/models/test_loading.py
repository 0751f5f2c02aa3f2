"""Loading: dtypes, stop tokens, and no code from a model's repository."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from prl_lightning.arithmetic import make_tokenizer
from prl_lightning.models.loading import (
    load_causal_lm,
    load_tokenizer,
    max_model_tokens,
    stop_token_ids,
)
from prl_lightning.sampling import HFSampler

Edit = Callable[..., str]


@pytest.fixture
def edited(tied_model: str, tmp_path: Path) -> Edit:
    """A function that copies a model and replaces fields of one of its JSON files."""

    def edit(name: str, **fields: object) -> str:
        shutil.copytree(tied_model, tmp_path / "model")
        file = tmp_path / "model" / name
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))
        return str(tmp_path / "model")

    return edit


def test_weights_are_float32_whatever_the_file_has(tied_model: str, tmp_path: Path) -> None:
    half = AutoModelForCausalLM.from_pretrained(tied_model, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").dtype == torch.bfloat16
    loaded = load_causal_lm(str(tmp_path))
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("configured", "expected"), [(1, (1,)), ([7, 5], (1, 5, 7)), (4, (1, 4)), (None, (1,))]
)
def test_stop_tokens_are_the_tokenizers_and_the_generation_configs(
    edited: Edit, configured: object, expected: tuple[int, ...]
) -> None:
    folder = edited("generation_config.json", eos_token_id=configured)
    tokenizer = make_tokenizer()
    assert stop_token_ids(folder, tokenizer) == expected
    if configured is None:
        tokenizer.eos_token = None
        with pytest.raises(ValueError, match=r"model\.policy=.*eos_token_id.*generation_config"):
            stop_token_ids(folder, tokenizer)


def test_the_config_gives_the_limit_and_the_stop_token_without_a_generation_config(
    edited: Edit,
) -> None:
    folder = edited("config.json", eos_token_id=6, max_position_embeddings=77)
    (Path(folder) / "generation_config.json").unlink()
    assert stop_token_ids(folder, make_tokenizer()) == (1, 6)
    assert max_model_tokens(folder) == 77


@pytest.fixture
def add_code(edited: Edit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Edit:
    """As ``edited``; the folder's code, and transformers' question whether to run it, fail."""

    def fail(question: str = "") -> str:
        raise AssertionError(question)

    def add(name: str, **fields: object) -> str:
        folder = edited(name, **fields)
        (tmp_path / "model" / "custom.py").write_text("raise AssertionError('code was run')\n")
        return folder

    # By default transformers asks in the terminal, for fifteen seconds, on every rank.
    monkeypatch.setattr("builtins.input", fail)
    return add


@pytest.mark.parametrize(
    "load", [load_causal_lm, max_model_tokens, lambda folder: HFSampler().start(folder, 8)]
)
def test_code_of_a_model_is_refused(add_code: Edit, load: Callable[[str], object]) -> None:
    code = {"AutoConfig": "custom.CustomConfig", "AutoModelForCausalLM": "custom.CustomModel"}
    folder = add_code("config.json", model_type="custom", auto_map=code)
    with pytest.raises(ValueError, match="trust_remote_code"):
        load(folder)


def test_code_of_a_tokenizer_is_not_run(tied_model: str, add_code: Edit) -> None:
    auto_map = {"AutoTokenizer": [None, "custom.CustomTokenizer"]}
    ours = load_tokenizer(add_code("tokenizer_config.json", auto_map=auto_map))
    theirs = AutoTokenizer.from_pretrained(tied_model)
    assert ours("3+5?")["input_ids"] == theirs("3+5?")["input_ids"]
