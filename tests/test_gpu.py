"""What needs a GPU: its kernels and memory, FSDP1, and half precision."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from prl_lightning.functional import token_logprobs
from prl_lightning.models.causal_lm import LogprobModel
from prl_lightning.objective import Objective
from prl_lightning.types import RolloutBatch
from random_models import batch_of, random_model
from ranks import SUPPORT, environment, gap, recorded_run, run_all
from tiny_runs import ARITHMETIC, metrics_of, tiny_overrides

pytestmark = [
    pytest.mark.process,
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GPUS = max(torch.cuda.device_count(), 1)
GIB = 2**30


def step(model: LogprobModel, batch: RolloutBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probabilities and gradients of one micro-batch."""
    logprobs, _ = model(batch)
    loss, _ = Objective(beta=0.5).loss(logprobs, torch.zeros_like(logprobs), batch, None)
    loss.backward()
    gradients = {name: weight.grad.cpu() for name, weight in model.named_parameters()}
    return logprobs.detach().cpu(), gradients


# Kernels


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "qwen3_moe", "mistral"])
def test_packed_rows_have_the_values_and_gradients_of_a_cpu(kind: str) -> None:
    window = {"sliding_window": 8} if kind == "mistral" else {}
    batch = batch_of([30, 7, 12, 1, 25, 3])
    expected, found = (
        step(LogprobModel(random_model(kind, **window)).to(device), batch.to(device))
        for device in ("cpu", "cuda")
    )
    torch.testing.assert_close(found[0], expected[0], atol=1e-4, rtol=1e-4)
    assert gap(found[1], expected[1]) < 1e-3


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])
def test_autocast_differs_from_float32_by_rounding(kind: str) -> None:
    batch = batch_of([30, 7, 12, 1, 25, 3]).to("cuda")
    exact = step(LogprobModel(random_model(kind)).cuda(), batch)
    with torch.autocast("cuda", dtype=torch.bfloat16, cache_enabled=False):
        half = step(LogprobModel(random_model(kind)).cuda(), batch)
    assert 1e-4 < (half[0] - exact[0]).abs().mean() < 0.1
    assert all(gradient.dtype == torch.float32 for gradient in half[1].values())


def test_training_does_not_wait_for_the_device() -> None:
    """torch raises an error if the host would wait."""
    model, batch = LogprobModel(random_model("qwen3")).cuda(), batch_of([30, 7, 12]).to("cuda")
    step(model, batch)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        logprobs, _ = model(batch)
        loss, _ = Objective().loss(logprobs, torch.zeros_like(logprobs), batch, None)
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Memory


@pytest.fixture
def fresh_memory() -> None:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


@pytest.mark.usefixtures("fresh_memory")
def test_the_output_head_never_holds_all_logits() -> None:
    tokens, hidden, vocabulary = 8192, 1024, 151_936
    rows = torch.randn(tokens, hidden, device="cuda", requires_grad=True)
    weight = torch.randn(vocabulary, hidden, device="cuda", requires_grad=True)
    targets = torch.randint(vocabulary, (tokens,), device="cuda")
    before = torch.cuda.max_memory_allocated()
    with torch.autocast("cuda", dtype=torch.bfloat16, cache_enabled=False):
        token_logprobs(rows, weight, targets)[0].sum().backward()
    # Of the weight: its gradient, a sum of it, and a copy in bfloat16.
    copies = 2 * weight.numel() * 4 + weight.numel() * 2
    assert torch.cuda.max_memory_allocated() - before < copies + 3 * GIB
    assert tokens * vocabulary * 4 > 4.5 * GIB


@pytest.mark.usefixtures("fresh_memory")
def test_a_micro_batch_takes_the_memory_that_was_calculated() -> None:
    """By benchmarks/fake_cuda: Qwen2.5-0.5B, 8 completions of 1,024 tokens, checkpointing."""
    results = SUPPORT.parents[1] / "benchmarks" / "results" / "fake_cuda.json"
    case = "Qwen2.5-0.5B, 8 x 1024, checkpointing, float32 weights"
    expected = json.loads(results.read_text())["memory"][case]["peak_gib"]
    with torch.device("cuda"):
        causal_lm = random_model(
            "qwen2", vocab_size=151_936, hidden_size=896, intermediate_size=4864,
            num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2, head_dim=64,
            tie_word_embeddings=True,
        )  # fmt: skip
    model = LogprobModel(causal_lm, gradient_checkpointing=True)
    batch = batch_of([1024] * 8, prompt=200, group=8).to("cuda")
    before = torch.cuda.memory_allocated()
    with torch.autocast("cuda", dtype=torch.bfloat16, cache_enabled=False):
        logprobs, _ = model(batch)
    logprobs.sum().backward()
    peak = (torch.cuda.max_memory_allocated() - before) / GIB
    print(f"peak {peak:.2f} GiB, calculated {expected:.2f}")
    assert peak == pytest.approx(expected, rel=0.25)


# Whole runs


def run_on_all_gpus(model: str, folder: Path, strategy: str, *more: str) -> list[str]:
    return [
        *recorded_run(model, folder),
        f"--data.prompts_per_epoch={4 * GPUS}",
        "--trainer.accumulate_grad_batches=2",
        f"--trainer.strategy={strategy}",
        f"--trainer.devices={GPUS}",
        *more,
    ]


@pytest.mark.parametrize("more", [[], ["--model.lora={r: 4, target_modules: all-linear}"]])
def test_strategies_agree(tied_model: str, tmp_path: Path, more: list[str]) -> None:
    """FSDP1 has its own code for clipping and gathering; the last steps on the host."""
    offload = "{class_path: prl_lightning.trainer.FSDP2Strategy, init_args: {cpu_offload: true}}"
    strategies = {"ddp": "ddp", "fsdp": "fsdp", "fsdp2": "fsdp2", "offload": offload}
    runs = {
        name: run_on_all_gpus(tied_model, tmp_path / name, strategy, *more)
        for name, strategy in strategies.items()
    }
    ddp, *sharded = (
        {name: tensor.cpu() for name, tensor in record["sent"].items()}
        for record in run_all(tmp_path, GPUS, runs).values()
    )
    for sent in sharded:
        assert gap(sent, ddp) < 1e-4


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "fsdp2"])
def test_each_rank_has_an_engine_that_follows_the_policy(
    tied_model: str, tmp_path: Path, strategy: str
) -> None:
    """With defaults: bfloat16 and CUDA graphs. The engine sleeps while its rank trains."""
    pytest.importorskip("vllm")
    engine = ["--rollout.sampler=VLLMSampler", "--rollout.sampler.sleeps=true"]
    precision = ["--rollout.max_engine_gap=null", "--trainer.precision=bf16-mixed"]
    run = run_on_all_gpus(tied_model, tmp_path / "run", strategy, *engine, *precision)
    record = run_all(tmp_path, GPUS, {"run": run})["run"]
    assert 1e-5 < record["metrics"]["rollout/engine_gap"] < 0.05
    assert gap(record["sent"], record["sent_before"]) > 1e-3


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("strategy", ["auto", "fsdp", "fsdp2"])
@pytest.mark.parametrize("sampler", ["HFSampler", "VLLMSampler"])
def test_half_precision_trains_and_the_engine_follows(
    tied_model: str, tmp_path: Path, precision: str, strategy: str, sampler: str
) -> None:
    if sampler == "VLLMSampler":
        pytest.importorskip("vllm")
    run = [
        *recorded_run(tied_model, tmp_path / "run"),
        f"--rollout.sampler={sampler}",
        "--rollout.max_engine_gap=null",
        f"--trainer.precision={precision}",
        f"--trainer.strategy={strategy}",
        "--trainer.devices=1",
    ]
    record = run_all(tmp_path, 1, {"run": run})["run"]
    assert record["metrics"]["rollout/engine_gap"] < 0.05
    assert gap(record["sent"], record["sent_before"]) > 1e-3


@pytest.mark.parametrize(("extras", "sampler"), [("", "HFSampler"), ("vllm", "VLLMSampler")])
def test_a_run_needs_only_the_dependencies(
    tied_model: str, tmp_path: Path, extras: str, sampler: str
) -> None:
    """transformers needs accelerate to load onto a GPU, which the extra dev also installs."""
    if extras:
        pytest.importorskip("vllm")
    run = [*tiny_overrides(tied_model, tmp_path, sampler), "--trainer.max_epochs=1"]
    command = ["only_dependencies.py", extras, "fit", f"--config={ARITHMETIC}", *run]
    subprocess.run(
        [sys.executable, *command, "--trainer.devices=1"],
        cwd=SUPPORT, env=environment(), check=True,
    )  # fmt: skip
    assert metrics_of(tmp_path)["rollout/engine_gap"][0] < 1e-3
