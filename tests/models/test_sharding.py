"""How a strategy shards: dtypes and devices, and weights in the memory of one rank only."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.precision import FSDPPrecision
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy
from transformers import Qwen2Config, Qwen2ForCausalLM

from prl_lightning.evaluation import Evaluation
from prl_lightning.models import sharding as sharding_module
from prl_lightning.models.sharding import Sharding, checksums, sharding_of
from prl_lightning.module import PRLModule
from prl_lightning.trainer import FSDP2Strategy
from ranks import start_on_ranks
from sharded_loads import record

pytestmark = pytest.mark.process


class Mesh(dict[str, Any]):
    """Two data-parallel ranks."""

    mesh_dim_names = ("data_parallel", "tensor_parallel")

    def __init__(self) -> None:
        sizes = {"data_parallel": 2, "tensor_parallel": 1}
        super().__init__({k: SimpleNamespace(size=lambda n=n: n) for k, n in sizes.items()})


class MetaDDP(DDPStrategy):
    root_device = torch.device("meta")


class MetaFSDP1(FSDPStrategy):
    root_device = torch.device("meta")


class MetaFSDP2(FSDP2Strategy):
    root_device = torch.device("meta")


def attached(strategy: Any, precision: str = "32-true", mesh: Mesh | None = None) -> PRLModule:
    """A module whose Trainer has this strategy, on a device that is not the CPU."""
    module = PRLModule("no model")
    data = SimpleNamespace(eval_buffers={"some": None}, evaluation=Evaluation())
    module._trainer = SimpleNamespace(strategy=strategy, precision=precision, datamodule=data)
    module._device_mesh = mesh
    return module


def sharding(strategy: Any, precision: str, mesh: Mesh | None = None) -> Sharding:
    found = sharding_of(attached(strategy, precision, mesh))
    assert found is not None
    assert found.device.type == "meta"
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [0, 1, 7, 16])
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_a_checksum_is_the_sum_of_all_bytes_in_their_words(
    dtype: torch.dtype, length: int, offset: int
) -> None:
    """By Python's integers, modulo 2^64; a view may begin at any element."""
    weight = torch.randn(30, generator=torch.Generator().manual_seed(0)).to(dtype)
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(weight[offset : offset + length])
    data = model.weight.detach().clone().view(torch.uint8).numpy().tobytes()
    whole, size = len(data) // 8 * 8, dtype.itemsize
    words = [data[i : i + 8] for i in range(0, whole, 8)]
    words += [data[i : i + size] for i in range(whole, len(data), size)]
    expected = sum(int.from_bytes(word, "little", signed=True) for word in words)
    (found,) = checksums(model)
    assert (found - expected) % 2**64 == 0
    if length:
        model.weight.data[-1] = torch.nextafter(model.weight.data[-1], torch.tensor(9.0).to(dtype))
        assert checksums(model) != [found]


def test_whole_models_are_not_sharded() -> None:
    assert sharding_of(PRLModule("no model")) is None
    assert sharding_of(attached(MetaDDP(), "bf16-mixed")) is None


@pytest.mark.parametrize(
    ("precision", "dtypes"),
    [("bf16-mixed", (torch.bfloat16, torch.float32)), ("32-true", (None, None)),
     ("bf16-true", (None, None)), ("16-mixed", (None, None))],
)  # fmt: skip
def test_fsdp2_gathers_in_half_precision_and_sums_in_float32(precision: str, dtypes: Any) -> None:
    policy = sharding(MetaFSDP2(), precision, Mesh()).policy
    assert (policy.param_dtype, policy.reduce_dtype) == dtypes


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_fsdp1_rounds_neither_buffers_nor_sums(precision: Any) -> None:
    strategy = MetaFSDP1(precision_plugin=FSDPPrecision(precision))
    half = torch.bfloat16
    for config, dtypes in (
        (strategy.mixed_precision_config, (half, half, half)),  # Lightning's own
        (sharding(strategy, precision).fsdp1_precision, (half, torch.float32, None)),
    ):
        assert config is not None
        assert (config.param_dtype, config.reduce_dtype, config.buffer_dtype) == dtypes


@pytest.mark.parametrize(("device", "is_pinned"), [("meta", False), ("cuda", True)])
def test_offloaded_shards_are_pinned_for_a_gpu(
    device: str, is_pinned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    strategy = MetaFSDP2(cpu_offload=True)
    strategy.root_device = torch.device(device)
    found = sharding_of(attached(strategy, mesh=Mesh()))
    assert found is not None
    assert found.offload == CPUOffloadPolicy(pin_memory=is_pinned)
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(sharding_module, "fully_shard", lambda _, **options: calls.append(options))
    sharding_module._shard(torch.nn.Linear(1, 1), found)
    assert calls[0]["offload_policy"] is found.offload
    assert type(sharding(MetaFSDP2(), "32-true", Mesh()).offload) is OffloadPolicy


@pytest.mark.parametrize("offloads", [False, True])
def test_only_offloaded_weights_stay_in_main_memory_for_a_second_stage(offloads: bool) -> None:
    module = attached(MetaFSDP2(cpu_offload=offloads), mesh=Mesh())
    module.setup("fit")
    module.policy = torch.nn.Linear(1, 1, device="cpu")
    module.setup("test")
    strategy: Any = module.trainer.strategy
    strategy._lightning_module = strategy.model = module
    strategy.model_to_device()
    assert module.policy.weight.device.type == ("cpu" if offloads else "meta")
    assert module.device.type == module.process_term.total.device.type == "meta"


@pytest.mark.parametrize(
    ("options", "device", "backend"),
    [
        ({}, "cuda", None),
        ({"cpu_offload": True}, "cpu", None),
        ({"cpu_offload": True}, "cuda", "cpu:gloo,cuda:nccl"),
        ({"cpu_offload": True, "process_group_backend": "own"}, "cuda", "own"),
    ],
)
def test_offloading_from_a_gpu_needs_collectives_in_main_memory(
    options: Any, device: str, backend: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None leaves the choice to Lightning."""
    monkeypatch.setattr(ModelParallelStrategy, "setup_environment", lambda self: None)
    strategy = MetaFSDP2(**options)
    strategy.root_device = torch.device(device)
    strategy.parallel_devices = [torch.device(device)]
    strategy.setup_environment()
    assert strategy.process_group_backend == backend


@pytest.mark.parametrize("strategy", [MetaDDP, MetaFSDP1, MetaFSDP2])
def test_the_module_and_its_metrics_are_on_the_strategys_device(strategy: Any) -> None:
    """FSDP1 moves only what it shards; batches and logged values follow ``module.device``."""
    module = attached(strategy(), mesh=Mesh())
    module.setup("fit")
    assert module.device.type == "meta"
    assert module.process_term.total.device.type == "meta"
    assert module.eval_metrics["some"].length.device.type == "meta"


# One model in main memory

CONFIG = Qwen2Config(
    vocab_size=64, hidden_size=640, intermediate_size=2560, num_hidden_layers=12,
    num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    architectures=["Qwen2ForCausalLM"],
)  # fmt: skip


@pytest.fixture(scope="module")
def loads(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Records of two ranks, with the model's size in MiB; no block is above a tenth of it."""
    folder = tmp_path_factory.mktemp("loads")
    with torch.random.fork_rng():
        model = Qwen2ForCausalLM(CONFIG)
    model.save_pretrained(folder / "model")
    CONFIG.save_pretrained(folder / "without_weights")
    paths = [str(folder / name) for name in ("model", "without_weights", "rank")]
    code, output = start_on_ranks(2, record, *paths).finish()
    assert code == 0, output
    size = sum(p.numel() for p in model.parameters()) * 4 / 2**20
    records = [json.loads((folder / f"rank.{rank}").read_text()) for rank in range(2)]
    return [record | {"size": size} for record in records]


@pytest.mark.parametrize("kind", ["plain", "lora"])
def test_every_rank_gets_the_first_ranks_weights_and_buffers(
    loads: list[dict[str, Any]], kind: str
) -> None:
    for load in loads:
        assert load[kind]["wrong"] == []
        assert load[kind]["compared"] > 100
        assert load[kind]["tied"]


def test_only_the_first_rank_has_the_whole_model_in_memory(loads: list[dict[str, Any]]) -> None:
    first, second = (load["extra_mib"] / load["size"] for load in loads)
    print(f"model {loads[0]['size']:.0f} MiB; rank 0 took {first:.0%}, rank 1 {second:.0%} of it")
    assert first > 0.9
    assert 0.5 < second < 0.75  # its half, and one block at a time


def test_all_ranks_say_why_the_first_could_not_load(loads: list[dict[str, Any]]) -> None:
    first, second = (load["failure"] for load in loads)
    assert first.startswith("OSError")
    assert second == f"RuntimeError: the first rank could not load the model: {first}"
