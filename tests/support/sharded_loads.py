"""Load models under FSDP2 on two ranks, and record the memory, the weights and a failure."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, OffloadPolicy

from prl_lightning.models.loading import load_causal_lm, load_policy
from prl_lightning.models.sharding import Sharding, full, load_on_ranks


def peak_mib() -> float:
    """Peak memory of this process since the last reset, counted by Linux."""
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def load(folder: str, lora: dict[str, Any] | None = None) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    sharding = Sharding(torch.device("cpu"), mesh, MixedPrecisionPolicy(), None, OffloadPolicy())
    return load_on_ranks(partial(load_policy, folder, lora), sharding, keep_root=True)


def compared(model: nn.Module, folder: str) -> dict[str, Any]:
    """Names of weights and buffers that differ from those of the folder."""
    theirs = load_causal_lm(folder)
    found = dict(model.state_dict()) | dict(model.named_buffers())
    ours = {
        name.removeprefix("causal_lm.").replace(".base_layer", ""): full(tensor)
        for name, tensor in found.items()
    }
    expected = dict(theirs.state_dict()) | dict(theirs.named_buffers())
    causal_lm: Any = model.causal_lm
    return {
        "wrong": [name for name in expected if not torch.equal(ours[name], expected[name])],
        "compared": len(expected),
        "tied": causal_lm.lm_head.weight is causal_lm.model.embed_tokens.weight,
    }


def record(folder: str, without_weights: str, out: str) -> None:
    """Write what this rank finds into a file of its own."""
    distributed.init_process_group("gloo")
    load_policy(folder, with_weights=False)  # the first load imports modules
    distributed.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = peak_mib()
    model = load(folder)
    found: dict[str, Any] = {"extra_mib": peak_mib() - before}
    found["plain"] = compared(model, folder)
    found["lora"] = compared(load(folder, {"r": 2, "target_modules": "all-linear"}), folder)
    try:
        load(without_weights)
    except Exception as error:
        found["failure"] = f"{type(error).__name__}: {error}"
    Path(f"{out}.{distributed.get_rank()}").write_text(json.dumps(found))
    distributed.destroy_process_group()
