"""The vLLM engine beside a trainer on a GPU."""

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
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SAMPLING = SamplingConfig(n=4, temperature=1.0, max_new_tokens=32, stop_token_ids=(1,))
PROMPTS = [Prompt([5 + row, 14, 7], "", seed=100 * row) for row in range(6)]


@pytest.fixture
def engines() -> Iterator[list[VLLMSampler]]:
    """What is put here is stopped in the end."""
    pytest.importorskip("vllm")
    started: list[VLLMSampler] = []
    yield started
    for sampler in started:
        sampler.stop()
    torch.cuda.empty_cache()


def test_the_engine_wakes_up_after_an_update_has_filled_the_memory(
    tied_model: str, engines: list[VLLMSampler]
) -> None:
    """What an update has freed is still torch's: the engine must get it back."""
    policy = load_policy(tied_model).cuda()
    sampler = VLLMSampler(sleeps=True, gpu_memory_utilization=0.5)
    engines.append(sampler)
    sampler.start(tied_model, 64)
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


def test_a_sleeping_engine_gives_its_memory_back_and_goes_on_the_same(
    tied_model: str, engines: list[VLLMSampler]
) -> None:
    sampler = VLLMSampler(sleeps=True, gpu_memory_utilization=0.3)
    engines.append(sampler)
    sampler.start(tied_model, 64)
    free_awake = torch.cuda.mem_get_info()[0]
    sampler.load_weights(named_weights(load_policy(tied_model)))
    first = sampler.generate(PROMPTS, SAMPLING)
    given_back = torch.cuda.mem_get_info()[0] - free_awake
    assert given_back > 0.2 * torch.cuda.mem_get_info()[1]
    assert sampler.generate(PROMPTS, SAMPLING) == first


def test_a_batch_invariant_engine_gives_a_seed_its_tokens_beside_any_others(
    tied_model: str, tmp_path: Path
) -> None:
    """In a process of its own: vLLM reads the mode once."""
    pytest.importorskip("vllm")
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs compute capability 9.0")
    script = tmp_path / "alone_and_beside.py"
    script.write_text(
        "import sys\n"
        "from prl_lightning.models.causal_lm import load_policy, named_weights\n"
        "from prl_lightning.sampling import VLLMSampler\n"
        "from test_gpu_engine import PROMPTS, SAMPLING\n"
        "sampler = VLLMSampler('bfloat16', gpu_memory_utilization=0.3, batch_invariant=True)\n"
        "sampler.start(sys.argv[1], 64)\n"
        "sampler.load_weights(named_weights(load_policy(sys.argv[1])))\n"
        "beside = sampler.generate(PROMPTS, SAMPLING)\n"
        "alone = [sampler.generate([prompt], SAMPLING)[0] for prompt in PROMPTS]\n"
        "assert alone == beside\n"
    )
    subprocess.run([sys.executable, str(script), tied_model], env=environment(), check=True)
