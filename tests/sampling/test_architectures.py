"""Each architecture in an engine, before and after an update; what vLLM cannot do is named first.

`pytest -s -m "" tests/sampling/test_architectures.py` prints the rows of the table in
docs/engines.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from architectures import ARCHITECTURES, REFUSED, tiny
from engine_gap import trainer_gap
from prl_lightning.models.causal_lm import named_weights
from prl_lightning.models.loading import load_policy
from prl_lightning.sampling import (
    HFSampler,
    Sampler,
    SamplingConfig,
    SubprocessSampler,
    VLLMSampler,
)
from prl_lightning.types import Prompt
from random_models import batch_of

# A cap of logits, a scale of logits, a window, and transformers' implementation in vLLM.
QUICK = ("gemma2", "granite", "mistral, window", "olmo2")
LONGEST = 96
SAMPLING = SamplingConfig(n=4, temperature=1.0, max_new_tokens=24, stop_token_ids=(1,))
PROMPTS = [
    Prompt([3 + (7 * i + row) % 60 for i in range(3 + 12 * row)], "", seed=100 * row)
    for row in range(4)
]
# vLLM's window is one token wider: rows must not be longer.
SIZES: dict[str, dict[str, Any]] = {"cohere2": {"sliding_window": LONGEST}}


def gaps(name: str, sampler: Sampler, folder: Path) -> list[float]:
    """Largest differences of log-probabilities, before and after an update."""
    tiny(name, **SIZES.get(name, {})).save_pretrained(folder)
    policy, found = load_policy(str(folder)), []
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    sampler.start(str(folder), LONGEST)
    try:
        for _ in range(2):
            sampler.load_weights(named_weights(policy, as_in_file=sampler.reads_files))
            groups = sampler.generate(PROMPTS, SAMPLING)
            found.append(trainer_gap(policy, PROMPTS, groups).max().item())
            policy(batch_of([3, 9, 5]))[0].mean().backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
    finally:
        sampler.stop()
    rows = "packed" if policy.is_packed else "padded"
    print(f"\n| {name} | {rows} | {type(sampler).__name__} | {found[0]:.0e} | {found[1]:.0e} |")
    return found


@pytest.mark.process
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow])
        for name in ARCHITECTURES
        if name not in REFUSED
    ],
)
def test_the_engine_agrees_before_and_after_an_update(name: str, tmp_path: Path) -> None:
    sampler = VLLMSampler(dtype="float32", cache_gib=0.1, gpu_memory_utilization=0.2)
    assert max(gaps(name, sampler, tmp_path)) < 1e-4


@pytest.mark.parametrize("name", ["gemma2", *REFUSED])
def test_transformers_agrees_where_vllm_does_not_run(name: str, tmp_path: Path) -> None:
    assert max(gaps(name, HFSampler(), tmp_path)) < 1e-4


@pytest.mark.skipif(torch.cuda.is_available(), reason="some run on a GPU")
@pytest.mark.parametrize("name", REFUSED)
def test_what_vllm_cannot_do_is_named_before_it_starts(name: str, tmp_path: Path) -> None:
    tiny(name).config.save_pretrained(tmp_path)
    message = rf"model\.policy.*'{name}'.*HFSampler"
    for sampler in (VLLMSampler(), SubprocessSampler(VLLMSampler())):
        with pytest.raises(ValueError, match=message):
            sampler.refuse_model(str(tmp_path), 8)


def test_rows_longer_than_a_window_that_vllm_reads_otherwise(tmp_path: Path) -> None:
    AutoConfig.for_model("cohere2", sliding_window=64).save_pretrained(tmp_path)
    VLLMSampler().refuse_model(str(tmp_path), 64)
    with pytest.raises(ValueError, match=r"model\.policy.*'cohere2'.*sliding_window=64.*65 tokens"):
        VLLMSampler().refuse_model(str(tmp_path), 65)


def test_an_architecture_without_an_implementation_is_named(tmp_path: Path) -> None:
    AutoConfig.for_model("xglm").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model\.policy.*'xglm'.*no implementation"):
        VLLMSampler().refuse_model(str(tmp_path), 8)
