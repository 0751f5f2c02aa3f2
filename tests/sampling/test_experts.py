"""Every expert of a mixture reaches the engine, before and after an update."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engine_gap import trainer_gap
from prl_lightning.models.causal_lm import LogprobModel, named_weights
from prl_lightning.models.loading import load_policy
from prl_lightning.sampling import HFSampler, Sampler, SamplingConfig, VLLMSampler
from prl_lightning.types import Prompt
from random_models import EXPERTS, random_model

pytestmark = pytest.mark.process

KINDS = ["qwen2_moe", "qwen3_moe", "olmoe", "mixtral"]
SAMPLING = SamplingConfig(n=4, temperature=1.0, max_new_tokens=16, stop_token_ids=(1,))
PROMPTS = [Prompt([5 + row, 14, 7], "", seed=100 * row) for row in range(4)]
# vLLM's attention on a CPU supports no heads smaller than 32.
SIZES: dict[str, Any] = {"hidden_size": 128, "max_position_embeddings": 256}


@pytest.fixture
def policy(request: pytest.FixtureRequest, tmp_path: Path) -> LogprobModel:
    random_model(request.param, **SIZES).save_pretrained(tmp_path)
    return load_policy(str(tmp_path))


@pytest.mark.parametrize("policy", KINDS, indirect=True)
def test_published_names_and_pieces_are_sent(policy: LogprobModel, tmp_path: Path) -> None:
    """As transformers has saved them."""
    saved = load_file(tmp_path / "model.safetensors")
    sent = dict(named_weights(policy, as_in_file=True))
    assert sum(".experts." in name for name in saved) == 2 * 3 * EXPERTS["num_experts"]
    assert sent.keys() == saved.keys()
    assert all(torch.equal(sent[name], saved[name]) for name in saved)


@pytest.mark.parametrize(
    ("policy", "engine"), [("olmoe", "hf"), *((kind, "vllm") for kind in KINDS)],
    indirect=["policy"],
)  # fmt: skip
def test_every_expert_reaches_the_engine(policy: LogprobModel, engine: str, tmp_path: Path) -> None:
    sampler: Sampler = HFSampler()
    if engine == "vllm":
        sampler = VLLMSampler(dtype="float32", cache_gib=0.1, gpu_memory_utilization=0.2)
    sampler.start(str(tmp_path), 64)
    try:
        for expert in (None, 0, 3, 7):
            with torch.no_grad():
                for name, weight in policy.named_parameters():
                    if ".experts." in name and expert is not None:
                        weight[expert] *= 1.5
            sampler.load_weights(named_weights(policy, as_in_file=sampler.reads_files))
            groups = sampler.generate(PROMPTS, SAMPLING)
            assert trainer_gap(policy, PROMPTS, groups).max() < 1e-4
    finally:
        sampler.stop()
