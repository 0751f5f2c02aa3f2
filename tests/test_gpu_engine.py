"""The vLLM engine on a trainer's GPU."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine_gap import trainer_gap
from prl_lightning.models.causal_lm import named_weights
from prl_lightning.models.loading import load_policy
from prl_lightning.sampling import SamplingConfig, VLLMSampler
from prl_lightning.types import Prompt
from ranks import environment

pytestmark = [
    pytest.mark.process,
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SAMPLING = SamplingConfig(n=4, temperature=1.0, max_new_tokens=32, stop_token_ids=(1,))
PROMPTS = [Prompt([5 + row, 14, 7], "", seed=100 * row) for row in range(6)]


@pytest.fixture(scope="module")
def sampler(tied_model: str) -> Iterator[VLLMSampler]:
    pytest.importorskip("vllm")
    started = VLLMSampler(sleeps=True, gpu_memory_utilization=0.5)
    started.start(tied_model, 64)
    yield started
    started.stop()
    torch.cuda.empty_cache()


def test_the_engine_wakes_up_after_an_update_has_filled_the_memory(
    tied_model: str, sampler: VLLMSampler
) -> None:
    """torch's allocator holds what the update has freed; the engine must get it back."""
    policy = load_policy(tied_model).cuda()
    sampler.load_weights(named_weights(policy, as_in_file=True))
    sampler.generate(PROMPTS, SAMPLING)
    free, total = torch.cuda.mem_get_info()
    assert free > 0.6 * total
    update = torch.empty(int(0.9 * free), dtype=torch.uint8, device="cuda")
    del update
    assert torch.cuda.mem_get_info()[0] < 0.2 * total
    with torch.no_grad():
        for weight in policy.parameters():
            weight.mul_(1.05)
    sampler.load_weights(named_weights(policy, as_in_file=True))
    groups = sampler.generate(PROMPTS, SAMPLING)
    assert trainer_gap(policy, PROMPTS, groups).mean() < 1e-4


def test_a_sleeping_engine_frees_its_memory_and_continues_unchanged(
    tied_model: str, sampler: VLLMSampler
) -> None:
    sampler.load_weights(named_weights(load_policy(tied_model)))  # wakes it
    free_awake = torch.cuda.mem_get_info()[0]
    first = sampler.generate(PROMPTS, SAMPLING)
    free_asleep, total = torch.cuda.mem_get_info()
    assert free_asleep - free_awake > 0.2 * total
    assert sampler.generate(PROMPTS, SAMPLING) == first


ALONE_AND_IN_A_BATCH = """
import sys
from prl_lightning.models.causal_lm import named_weights
from prl_lightning.models.loading import load_policy
from prl_lightning.sampling import VLLMSampler
from test_gpu_engine import PROMPTS, SAMPLING

sampler = VLLMSampler("bfloat16", gpu_memory_utilization=0.3, batch_invariant=True)
sampler.start(sys.argv[1], 64)
sampler.load_weights(named_weights(load_policy(sys.argv[1])))
in_a_batch = sampler.generate(PROMPTS, SAMPLING)
alone = [sampler.generate([prompt], SAMPLING)[0] for prompt in PROMPTS]
assert alone == in_a_batch
"""


def test_a_batch_invariant_engine_gives_a_seed_the_same_tokens_in_any_batch(
    tied_model: str,
) -> None:
    """In a subprocess: vLLM reads the mode once."""
    pytest.importorskip("vllm")
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs compute capability 9.0")
    subprocess.run(
        [sys.executable, "-c", ALONE_AND_IN_A_BATCH, tied_model],
        cwd=Path(__file__).parent, env=environment(), check=True,
    )  # fmt: skip
