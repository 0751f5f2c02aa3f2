"""How a strategy shards: dtypes, devices, and one whole model in main memory, not one a rank."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.precision import FSDPPrecision
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from transformers import Qwen2Config, Qwen2ForCausalLM

from prl_lightning.evaluation import Evaluation
from prl_lightning.models.sharding import sharding_of
from prl_lightning.module import PRLModule
from prl_lightning.trainer import FSDP2Strategy
from ranks import SUPPORT, environment


class Mesh(dict[str, Any]):
    """Of two data-parallel ranks, and so many tensor-parallel ones."""

    def __init__(self, tensor_parallel: int = 1) -> None:
        sizes = {"data_parallel": 2, "tensor_parallel": tensor_parallel}
        super().__init__({k: SimpleNamespace(size=lambda n=n: n) for k, n in sizes.items()})


class ElsewhereDDP(DDPStrategy):
    root_device = torch.device("meta")


class ElsewhereFSDP1(FSDPStrategy):
    root_device = torch.device("meta")


class ElsewhereFSDP2(FSDP2Strategy):
    root_device = torch.device("meta")


def attached(strategy: Any, precision: str, mesh: Mesh | None = None) -> PRLModule:
    """A module whose Trainer has this strategy, on a device that is not the CPU."""
    module = PRLModule("no model")
    data = SimpleNamespace(eval_rollouts={"some": None}, evaluation=Evaluation())
    module._trainer = SimpleNamespace(strategy=strategy, precision=precision, datamodule=data)
    module._device_mesh = mesh
    return module


def test_whole_models_are_not_sharded() -> None:
    assert sharding_of(PRLModule("no model")) is None
    assert sharding_of(attached(ElsewhereDDP(), "bf16-mixed")) is None


@pytest.mark.parametrize(
    ("precision", "gathered", "added_up"),
    [("bf16-mixed", torch.bfloat16, torch.float32), ("32-true", None, None),
     ("bf16-true", None, None), ("16-mixed", None, None)],
)  # fmt: skip
def test_fsdp2_gathers_in_half_precision_and_adds_up_in_float32(
    precision: str, gathered: torch.dtype | None, added_up: torch.dtype | None
) -> None:
    sharding = sharding_of(attached(ElsewhereFSDP2(), precision, Mesh()))
    assert sharding is not None
    assert sharding.device.type == "meta"
    assert (sharding.policy.param_dtype, sharding.policy.reduce_dtype) == (gathered, added_up)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_fsdp1_rounds_neither_buffers_nor_sums(precision: Any) -> None:
    strategy = ElsewhereFSDP1(precision_plugin=FSDPPrecision(precision))
    lightnings = strategy.mixed_precision_config
    assert lightnings is not None
    assert (lightnings.reduce_dtype, lightnings.buffer_dtype) == (torch.bfloat16,) * 2
    sharding = sharding_of(attached(strategy, precision))
    assert sharding is not None
    ours = sharding.fsdp1_precision
    assert ours is not None
    assert (ours.param_dtype, ours.reduce_dtype, ours.buffer_dtype) == (
        torch.bfloat16, torch.float32, None,
    )  # fmt: skip


def test_tensor_parallelism_is_refused() -> None:
    with pytest.raises(ValueError, match="tensor_parallel_size=2"):
        sharding_of(attached(ElsewhereFSDP2(), "32-true", Mesh(tensor_parallel=2)))


@pytest.mark.parametrize("strategy", [ElsewhereDDP, ElsewhereFSDP1, ElsewhereFSDP2])
def test_the_module_and_its_metrics_are_where_the_strategy_computes(strategy: Any) -> None:
    """FSDP1 moves no more than it shards; batches and logged values follow ``module.device``."""
    module = attached(strategy(), "32-true", Mesh())
    module.setup("fit")
    assert module.device.type == "meta"
    assert module.process_term.total.device.type == "meta"
    assert module.eval_metrics[0].length.device.type == "meta"


# One model in main memory


@pytest.fixture(scope="module")
def large_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, float]:
    """A folder, and how many MiB its weights are; no block is more than a tenth of them."""
    folder = tmp_path_factory.mktemp("large") / "model"
    config = Qwen2Config(
        vocab_size=64, hidden_size=640, intermediate_size=2560, num_hidden_layers=12,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng():
        model = Qwen2ForCausalLM(config)
    model.save_pretrained(folder)
    return str(folder), sum(p.numel() for p in model.parameters()) * 4 / 2**20


@pytest.fixture(scope="module")
def loads(large_model: tuple[str, float], tmp_path_factory: Any) -> list[dict[str, Any]]:
    """What each of two ranks says of its loads."""
    folder = tmp_path_factory.mktemp("loads")
    Qwen2Config(architectures=["Qwen2ForCausalLM"]).save_pretrained(folder)  # and no weights
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = ["sharded_loads.py", large_model[0], str(folder), str(folder / "rank")]
    subprocess.run(
        [sys.executable, *torchrun, *script],
        cwd=SUPPORT, env=environment(), timeout=300, check=True,
    )  # fmt: skip
    return [json.loads((folder / f"rank.{rank}").read_text()) for rank in range(2)]


@pytest.mark.parametrize("kind", ["plain", "lora"])
def test_every_rank_gets_the_first_ranks_weights_and_buffers(
    loads: list[dict[str, Any]], kind: str
) -> None:
    for load in loads:
        assert load[kind]["wrong"] == []
        assert load[kind]["compared"] > 100
        assert load[kind]["tied"]


def test_no_rank_but_the_first_ever_has_the_model_in_main_memory(
    loads: list[dict[str, Any]], large_model: tuple[str, float]
) -> None:
    size, (first, second) = large_model[1], (load["extra_mib"] for load in loads)
    print(f"model {size:.0f} MiB; rank 0 took {first:.0f}, rank 1 {second:.0f}")
    assert first > 0.9 * size
    assert 0.5 * size < second < 0.75 * size  # its half, and a block at a time


def test_all_ranks_say_why_the_first_could_not_load(loads: list[dict[str, Any]]) -> None:
    first, second = (load["failure"] for load in loads)
    assert first.startswith("OSError")
    assert second == f"RuntimeError: the first rank could not load the model: {first}"
