"""Seconds of an iteration, worked out by hand on hardware with round numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from transformers import Qwen3MoeConfig

from prl_lightning.checks.contradictions import ConfigurationError
from prl_lightning.checks.duration import (
    GPUS,
    Hardware,
    ModelCosts,
    Work,
    costs_of,
    hardware,
    sampling_seconds,
    update_seconds,
)
from prl_lightning.cli import main
from tiny_runs import ARITHMETIC, tiny_overrides

# Shares of the peaks (0.4 and 0.5 on a GPU) are divided out.
UPDATES = Hardware("round", "cuda", half_flops=2e6 / 0.4, flops=1e6 / 0.4, bandwidth=1.0)
SAMPLES = Hardware("round", "cuda", half_flops=2e6 / 0.5, flops=1e6 / 0.5, bandwidth=1e3 / 0.5)
COSTS = ModelCosts(body=1000.0, head=500.0, read=1500.0, attention=10.0, cached=0.0)
WORK = Work(prompts=2, group_size=3, prompt_tokens=20, completion_tokens=10)


def test_the_work_of_an_update() -> None:
    """2 prompts of 20 tokens once, 6 completions of 10: 100 tokens, 60 of them with the head."""
    forward = 100 * 2 * 1000 + 60 * (2 * 500 + 10 * 25)
    assert update_seconds(WORK, COSTS, UPDATES, False, 1) == pytest.approx(forward / 1e6)
    assert update_seconds(WORK, COSTS, UPDATES, True, 4) == pytest.approx(2 * forward / 1e6)


def test_sampling_that_computes() -> None:
    """40 prompt tokens, then 10 steps of 6 rows; with so much bandwidth no step waits for it."""
    fast = replace(SAMPLES, bandwidth=1e30)
    computed = 40 * 2 * 1000 + 10 * 6 * (2 * 1500 + 10 * 25)
    host = 10 * (0.006 + 6 * 65e-6)
    assert sampling_seconds(WORK, COSTS, fast, False) == pytest.approx(computed / 1e6 + host)


def test_sampling_that_reads_weights_and_cache() -> None:
    """10 steps read 1,500 weights and 7 numbers for each of the 25 tokens of 6 rows."""
    fast = replace(SAMPLES, half_flops=1e30)
    read = 10 * 2 * (1500 + 6 * 25 * 7)
    host = 10 * (0.006 + 6 * 65e-6)
    found = sampling_seconds(WORK, replace(COSTS, cached=7.0), fast, True)
    assert found == pytest.approx(read / 1e3 + host)


def test_more_completions_than_the_engine_runs_at_once_are_waves() -> None:
    one, two = (replace(WORK, prompts=1, group_size=size, prompt_tokens=0) for size in (256, 512))
    seconds = [sampling_seconds(work, COSTS, SAMPLES, False) for work in (one, two)]
    assert seconds[1] == pytest.approx(2 * seconds[0])


def test_a_models_weights(tied_model: str, untied_model: str) -> None:
    """Two layers of width 64 with 2 heads and 1 key-value head, as conftest.py makes them."""
    layer = 64 * 64 + 64 + 2 * (64 * 32 + 32) + 64 * 64 + 3 * 64 * 64 + 2 * 64
    tied, untied = costs_of(tied_model), costs_of(untied_model)
    assert tied == untied
    assert tied.body == 2 * layer + 64
    assert tied.head % 64 == 0
    assert tied.read == tied.body + tied.head
    assert tied.attention == 4 * 2 * 64
    assert tied.cached == 2 * 2 * 32


def test_a_token_uses_some_of_the_experts_and_a_step_reads_them_all(tmp_path: Path) -> None:
    config = Qwen3MoeConfig(
        vocab_size=32, hidden_size=16, moe_intermediate_size=8, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_experts=8,
        num_experts_per_tok=2, architectures=["Qwen3MoeForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    costs = costs_of(str(tmp_path))
    experts = 3 * 8 * 3 * 16 * 8
    assert costs.read - costs.head - costs.body == experts * 6 / 8


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA H20", "H20"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA GeForce RTX 4090", "RTX4090"),
    ],
)
def test_a_gpu_is_known_by_its_drivers_name(name: str, key: str) -> None:
    assert hardware(name) == Hardware(key, "cuda", *GPUS[key])


def test_check_says_the_time(
    tied_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["check", f"--config={ARITHMETIC}", *tiny_overrides(tied_model, tmp_path)]
    main([*run, "--gpu=h100"])
    assert "time of an iteration on 1 x H100" in capsys.readouterr().out
    main(run)
    assert "time of an iteration on 1 x " in capsys.readouterr().out
    with pytest.raises(ConfigurationError, match="--gpu=abacus"):
        main([*run, "--gpu=abacus"])
