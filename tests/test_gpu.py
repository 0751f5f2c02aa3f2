"""What only a GPU can show: FSDP1, which wants one, half precision on it, and the engine there."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from prl_lightning.models import load_policy, named_weights
from prl_lightning.samplers import SamplingConfig, VLLMSampler
from prl_lightning.types import Prompt
from ranks import gap, recorded_run, run_all

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GPUS = max(torch.cuda.device_count(), 1)


def prompts_for(ranks: int) -> list[str]:
    return [f"--data.prompts_per_epoch={4 * ranks}", "--trainer.accumulate_grad_batches=2"]


@pytest.mark.parametrize("more", [[], ["--model.lora={r: 4, target_modules: all-linear}"]])
def test_strategies_agree(tied_model: str, tmp_path: Path, more: list[str]) -> None:
    """FSDP1 clips and gathers by ways of its own."""
    strategies = ("ddp", "fsdp", "fsdp2")
    runs = {
        strategy: [
            *recorded_run(tied_model, tmp_path / strategy),
            *prompts_for(GPUS),
            *more,
            f"--trainer.strategy={strategy}",
            f"--trainer.devices={GPUS}",
        ]
        for strategy in strategies
    }
    records = run_all(tmp_path, GPUS, runs)
    sent = {strategy: records[strategy]["sent"] for strategy in strategies}
    for strategy in ("fsdp", "fsdp2"):
        ours = {name: tensor.cpu() for name, tensor in sent[strategy].items()}
        assert gap(ours, {name: tensor.cpu() for name, tensor in sent["ddp"].items()}) < 1e-4


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("strategy", ["auto", "fsdp", "fsdp2"])
@pytest.mark.parametrize("sampler", ["HFSampler", "VLLMSampler"])
def test_half_precision_trains_and_the_engine_follows(
    tied_model: str, tmp_path: Path, precision: str, strategy: str, sampler: str
) -> None:
    if sampler == "VLLMSampler" and importlib.util.find_spec("vllm") is None:
        pytest.skip("needs vllm")
    run = [
        *recorded_run(tied_model, tmp_path / "run"),
        f"--rollout.sampler={sampler}",
        "--rollout.sampler.dtype=bfloat16",
        "--rollout.max_engine_gap=null",
        f"--trainer.precision={precision}",
        f"--trainer.strategy={strategy}",
        "--trainer.devices=1",
    ]
    record = run_all(tmp_path, 1, {"run": run})["run"]
    assert record["metrics"]["rollout/engine_gap"] < 0.05
    assert gap(record["sent"], record["sent_before"]) > 1e-3


def test_a_sleeping_engine_gives_its_memory_back_and_goes_on_the_same(tied_model: str) -> None:
    pytest.importorskip("vllm")
    prompts = [Prompt([5, 14, 7], "", seed=1)]
    config = SamplingConfig(n=2, temperature=1.0, max_new_tokens=8, stop_token_ids=(1,))
    sampler = VLLMSampler(sleeps=True, gpu_memory_utilization=0.3)
    sampler.start(tied_model, 32)
    free_awake = torch.cuda.mem_get_info()[0]
    sampler.load_weights(named_weights(load_policy(tied_model)))
    first = sampler.generate(prompts, config)
    given_back = torch.cuda.mem_get_info()[0] - free_awake
    assert given_back > 0.2 * torch.cuda.mem_get_info()[1]
    assert sampler.generate(prompts, config) == first
