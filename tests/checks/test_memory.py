"""The memory of an optimizer, counted on a probe, and what is counted as main memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

from prl_lightning.checks.memory import _state_share
from prl_lightning.cli import main
from prl_lightning.module import PRLModule
from tiny_runs import ARITHMETIC, memory_of, tiny_overrides


class Wrapped(torch.optim.SGD):
    """Keep a wrapper of one half-precision tensor and one of bytes for each weight."""

    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            half, small = torch.zeros_like(parameter).half(), torch.zeros(128, 128).to(torch.uint8)
            self.state[parameter]["moments"] = TwoTensor(half, small.half())


@pytest.mark.parametrize(
    ("optimizer", "share"),
    [
        (torch.optim.AdamW, 2),  # and the number of steps, once
        (torch.optim.SGD, 0),
        (lambda p: torch.optim.SGD(p, momentum=0.9), 1),
        (torch.optim.Adafactor, (128 + 128) / (128 * 128)),  # a row and a column
        (Wrapped, (2 + 2) / 4),
    ],
)
def test_what_an_optimizer_keeps(optimizer: Callable[..., Any], share: float) -> None:
    assert _state_share(PRLModule("none", optimizer=optimizer)) == pytest.approx(share, rel=1e-6)


Estimate = Callable[..., dict[str, int]]


@pytest.fixture
def estimate(
    tied_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Estimate:  # fmt: skip
    """The bytes of each line of `prl check`."""
    monkeypatch.setattr("prl_lightning.checks.memory.MIB", 1)

    def of(*more: str) -> dict[str, int]:
        run = tiny_overrides(tied_model, tmp_path, "SubprocessSampler")
        engine = "--rollout.sampler.sampler=VLLMSampler"
        main(["check", f"--config={ARITHMETIC}", *run, engine, "--rollout.overlap=true", *more])
        return memory_of(capsys.readouterr().out)

    return of


def test_weights_that_wait_for_the_engine_are_counted(estimate: Estimate) -> None:
    one, three = estimate(), estimate("--rollout.max_staleness=3")
    assert "queued weights" not in one
    assert three["queued weights"] == 3 * one["engine"]
    assert three["in all"] - one["in all"] == three["queued weights"]
    on_gpu = estimate("--rollout.max_staleness=3", "--gpu=H100")
    assert on_gpu["in the update"] == estimate("--gpu=H100")["in the update"]


def test_micro_batches_are_as_long_as_they_may_be(estimate: Estimate) -> None:
    """16 completions of at most 16 + 8 tokens, in two micro-batches of 192 tokens."""
    half = estimate()["activations"]
    for tokens, share in ((1, 1), (192, 1), (288, 1.5), (1000, 2)):
        found = estimate(f"--data.micro_batch_tokens={tokens}")["activations"]
        assert found == pytest.approx(share * half, abs=2)
    many = ("--trainer.accumulate_grad_batches=16", "--data.micro_batch_tokens=48")
    assert estimate(*many)["activations"] == pytest.approx(half / 4, abs=2)


def test_what_is_offloaded_is_in_main_memory(estimate: Estimate) -> None:
    kind = "class_path: prl_lightning.trainer.FSDP2Strategy"
    whole, offloaded = (
        ["--trainer.accelerator=cpu", f"--trainer.strategy={{{kind}, init_args: {args}}}"]
        for args in ("{}", "{cpu_offload: true}")
    )
    parts = ("policy", "gradient", "optimizer", "reference")
    size = sum(estimate(*whole)[name] for name in parts)
    assert estimate(*offloaded)["offloaded"] == size
    assert estimate(*offloaded)["in all"] == estimate(*whole)["in all"]
    before, after = (estimate(*strategy, "--gpu=H100") for strategy in (whole, offloaded))
    assert before["in the update"] - after["in the update"] == size


def test_the_engine_in_the_trainers_process_is_freed_before_the_update(estimate: Estimate) -> None:
    inside = ("--rollout.overlap=false", "--rollout.sampler=VLLMSampler")
    for cache in (0.001, 1.0):
        found = estimate(*inside, f"--rollout.sampler.cache_gib={cache}")
        held = sum(found[name] for name in ("policy", "optimizer", "reference"))
        update = held + sum(found[name] for name in ("gradient", "activations", "logits"))
        sampling = held + found["engine"] + cache * 2**30
        assert (sampling > update) == (cache == 1)
        assert found["in all"] - found["code"] == pytest.approx(max(update, sampling), abs=5)
        beside = estimate(f"--rollout.sampler.sampler.cache_gib={cache}")
        both = update + sampling - held
        assert beside["in all"] - beside["code"] == pytest.approx(both, abs=5)
