"""Tiny models and rollouts that any test can use."""

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

# Before torch is loaded, here and in what the tests start: a tiny model on several threads waits
# for them more than it computes.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings
from transformers import Qwen2Config, Qwen2ForCausalLM

from prl_lightning.arithmetic import make_tokenizer
from prl_lightning.types import Completion, Prompt, Rollout

# The same examples in each run, so that a change fails for what it does. To look for others:
# --hypothesis-profile=default, and PRL_FUZZ=1000 for many of the slow ones.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

MakeRollout = Callable[[list[int], list[int]], Rollout]


def save_tiny_model(folder: Path, tie: bool) -> str:
    """A random Qwen2 with grouped attention, far from uniform, every weight of it random."""
    tokenizer = make_tokenizer()
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        tie_word_embeddings=tie,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = 0.2 * torch.randn_like(weight)
            weight.copy_(1 + noise if "norm" in name else noise)
    # What a published model may recommend; an engine that obeyed would bend the distribution.
    model.generation_config.update(do_sample=True, top_k=3, repetition_penalty=2.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tied_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny model whose output head is its embedding, with the character tokenizer."""
    with torch.random.fork_rng():
        return save_tiny_model(tmp_path_factory.mktemp("model") / "tied", tie=True)


@pytest.fixture(scope="session")
def untied_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same with an output head of its own."""
    with torch.random.fork_rng():
        return save_tiny_model(tmp_path_factory.mktemp("model") / "untied", tie=False)


@pytest.fixture(scope="session")
def make_rollout() -> MakeRollout:
    """A rollout of these prompt and completion tokens; log-probabilities are -1, -2, and so on."""

    def make(prompt: list[int], completion: list[int]) -> Rollout:
        logprobs = [-float(place + 1) for place in range(len(completion))]
        return Rollout(Prompt(prompt, ""), Completion(completion, logprobs, finished=True), text="")

    return make


def pytest_collection() -> None:
    # xdist starts its workers by `python -c`, a program that Lightning cannot start again.
    sys.argv[0] = __file__
    gc.disable()  # what the tests import is no garbage


def pytest_collection_finish() -> None:
    gc.enable()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-processes", action="store_true", help="refuse to start processes")


@pytest.fixture(autouse=True, scope="session")
def _no_processes(request: pytest.FixtureRequest) -> None:
    """With ``--no-processes``, a test that starts one fails and says how to mark it."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("mark this test with pytest.mark.process: it starts a process")

    if request.config.getoption("--no-processes"):
        subprocess.Popen._execute_child = refuse  # type: ignore[attr-defined]
        BaseProcess.start = refuse  # type: ignore[method-assign]


@pytest.fixture(autouse=True, scope="session")
def _datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep what `datasets` converts out of the user's cache."""
    import datasets

    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
