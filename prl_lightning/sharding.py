"""Spread a model over the ranks, and put its weights together again one by one."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import wrap
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm


def shard(
    model: nn.Module, blocks: Collection[nn.Module], mesh: DeviceMesh | None, keep_root: bool
) -> nn.Module:
    """Shard a model as the Trainer's strategy wants it.

    Called in ``configure_model``: with the mesh of ModelParallelStrategy by FSDP2, inside the
    context of FSDPStrategy by FSDP1, under any other strategy not at all.

    Args:
        model: the root; it holds whatever is in no block.
        blocks: modules of the model that are gathered one after the other.
        mesh: the strategy's ``device_mesh``, None if it has none.
        keep_root: keep the root gathered from forward to backward (FSDP2).

    Returns:
        The model, or what replaces it.

    Raises:
        ValueError: the mesh asks for tensor parallelism.
    """
    if mesh is None:
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if child in blocks:
                    setattr(parent, name, wrap(child))
        return wrap(model)
    if mesh["tensor_parallel"].size() > 1:
        raise ValueError(
            f"trainer.strategy: tensor_parallel_size={mesh['tensor_parallel'].size()}, but models "
            "are sharded over data-parallel ranks only. Use `strategy: fsdp2`."
        )
    data_parallel = mesh["data_parallel"]
    for block in blocks:
        fully_shard(block, mesh=data_parallel)
    fully_shard(model, mesh=data_parallel, reshard_after_forward=not keep_root)
    if data_parallel.device_type == "cpu":
        # gloo has no mean, and in some versions of torch (2.8) takes the sum in its place.
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)
    return model


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded; a collective if it is."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def plain_name(name: str) -> str:
    """A module's or a parameter's name without what FSDP1 adds to it."""
    return name.replace("_fsdp_wrapped_module.", "")


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers by name, sharded ones as they are, tied ones twice.

    FSDP1 cannot name its shards, so under it all parameters are gathered for the time of the
    iteration; the other strategies have no such moment.
    """
    if not isinstance(model, FullyShardedDataParallel):
        yield from model.state_dict().items()
        return
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        for name, parameter in model.named_parameters(remove_duplicate=False):
            yield plain_name(name), parameter


def total_norm(model: nn.Module) -> Tensor:
    """Norm of the gradient over all parameters of all ranks."""
    norm = full(get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
    if isinstance(model, FullyShardedDataParallel):  # each rank has only its own part
        squares = norm.square()
        torch.distributed.all_reduce(squares)
        norm = squares.sqrt()
    return norm


def leave_frozen_out(module: nn.Module) -> None:
    """Keep what is not trained out of a module's state: it does not change.

    Args:
        module: its reference, and the weights under an adapter, are frozen when a state is taken.
    """
    module.register_state_dict_post_hook(_drop_frozen)  # type: ignore[no-untyped-call]
    module.register_load_state_dict_post_hook(_expect_no_frozen)  # type: ignore[no-untyped-call]


def _drop_frozen(module: nn.Module, state: dict[str, Any], *_: Any) -> None:
    for name in _frozen(module) & state.keys():
        del state[name]


def _expect_no_frozen(module: nn.Module, incompatible: Any) -> None:
    frozen = _frozen(module)
    missing = [name for name in incompatible.missing_keys if name not in frozen]
    incompatible.missing_keys[:] = missing


def _frozen(module: nn.Module) -> set[str]:
    """Names of parameters that are not trained."""
    return {
        plain_name(name)
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if not parameter.requires_grad
    }
