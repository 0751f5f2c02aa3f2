"""Shard a model over the ranks, and gather its weights one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import wrap
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.utils import get_total_norm

from prl_lightning.models.mesh import sharded_dimensions

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


@dataclass(frozen=True)
class Sharding:
    """How a strategy shards a model.

    Attributes:
        device: of this rank.
        mesh: of FSDP2; None under FSDP1.
        policy: dtypes of FSDP2. Under bf16-mixed, weights are gathered and multiplied in bfloat16;
            shards, gradient sums and the optimizer stay in float32.
        fsdp1_precision: dtypes of FSDP1; None if it changes none.
        offload: where FSDP2 keeps the shards.
    """

    device: torch.device
    mesh: DeviceMesh | None
    policy: MixedPrecisionPolicy
    fsdp1_precision: MixedPrecision | None
    offload: OffloadPolicy


def is_sharding(strategy: Strategy) -> bool:
    """Return whether a strategy shards the model over the ranks."""
    return isinstance(strategy, (FSDPStrategy, ModelParallelStrategy))


def is_offloading(strategy: Strategy) -> bool:
    """Return whether an FSDP2Strategy keeps its shards in main memory."""
    return isinstance(strategy, ModelParallelStrategy) and getattr(strategy, "cpu_offload", False)


def sharding_of(module: LightningModule) -> Sharding | None:
    """Return how the module's strategy shards, or None if each rank holds the whole model.

    Args:
        module: with or without a Trainer.
    """
    trainer = module._trainer
    if trainer is None or not is_sharding(trainer.strategy):
        return None
    strategy, mesh = trainer.strategy, module.device_mesh
    policy, fsdp1_precision = MixedPrecisionPolicy(), None
    if trainer.precision == "bf16-mixed":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if isinstance(strategy, FSDPStrategy) and strategy.mixed_precision_config is not None:
        # Lightning's config rounds gradients before summing them. It also rounds buffers: with
        # rounded rotary frequencies, angles are wrong by a radian after some hundred tokens.
        fsdp1_precision = replace(
            strategy.mixed_precision_config, reduce_dtype=torch.float32, buffer_dtype=None
        )
    device, offload = strategy.root_device, OffloadPolicy()
    if is_offloading(strategy):
        offload = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    return Sharding(device, mesh, policy, fsdp1_precision, offload)


def load_on_ranks(
    load: Callable[..., nn.Module], sharding: Sharding | None, keep_root: bool
) -> nn.Module:
    """Load a model on all ranks, whole or sharded; a collective, for ``configure_model``.

    If it is sharded, only the first rank reads the weights and holds all of them in main memory.
    The other ranks hold their shard and one block at a time.

    Args:
        load: builds the model; with ``with_weights=False``, on the meta device. The blocks returned
            by its ``blocks()`` are gathered one by one. All other modules belong to the root.
        sharding: how to shard; None for whole models.
        keep_root: keep the root gathered between forward and backward (FSDP2).

    Returns:
        The model, or its FSDP1 wrapper.

    Raises:
        RuntimeError: the first rank could not load it.
    """
    if sharding is None:
        return load()
    model = _load_on_first_rank(load)
    blocks: list[nn.Module] = model.blocks()  # type: ignore[operator]
    in_blocks = {module for block in blocks for module in block.modules()}
    of_root = [module for module in model.modules() if module not in in_blocks]
    for name, module in list(model.named_modules()):
        if module in blocks:
            _take_from_first_rank(module.modules(), sharding.device)
            model.set_submodule(name, _shard(module, sharding))
    _take_from_first_rank(of_root, sharding.device)
    model = _shard(model, sharding, reshard=not keep_root)
    if sharding.device.type == "cpu":
        # gloo cannot average. Some versions of torch (2.8) would silently sum instead.
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)
    return model


def _load_on_first_rank(load: Callable[..., nn.Module]) -> nn.Module:
    failure: list[str | None] = [None]
    if distributed.get_rank() == 0:
        try:
            return load()
        except Exception as error:
            failure = [f"{type(error).__name__}: {error}"]
            raise
        finally:  # the other ranks wait for this message, also after a failure
            distributed.broadcast_object_list(failure)
    distributed.broadcast_object_list(failure)
    if failure[0] is not None:
        raise RuntimeError(f"the first rank could not load the model: {failure[0]}")
    return load(with_weights=False)


@torch.no_grad()
def _take_from_first_rank(modules: Iterable[nn.Module], device: torch.device) -> None:
    """Replace parameters and buffers by those of the first rank, on ``device``."""
    take = cache(partial(_broadcast, device=device))  # cached: tied tensors stay tied
    for module in modules:
        held: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in held:
            tensors.update({name: take(x) for name, x in tensors.items() if x is not None})


def _broadcast(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the first rank's values of a tensor; other ranks pass one on the meta device."""
    if distributed.get_rank() == 0:
        whole = tensor.detach().to(device).contiguous()
    else:
        whole = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    distributed.broadcast(whole, src=0)
    return nn.Parameter(whole, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else whole


def _shard(module: nn.Module, sharding: Sharding, reshard: bool = True) -> nn.Module:
    if sharding.mesh is None:
        return wrap(module, mixed_precision=sharding.fsdp1_precision)
    mesh = sharded_dimensions(sharding.mesh)
    fully_shard(
        module,
        mesh=mesh,
        mp_policy=sharding.policy,
        offload_policy=sharding.offload,
        reshard_after_forward=reshard,
    )
    return module


def full(tensor: Tensor) -> Tensor:
    """Return the unsharded tensor; a collective if it is sharded.

    Offloaded shards are gathered on the ranks' devices.
    """
    if isinstance(tensor, DTensor):
        on_device: Any = tensor.detach().to(tensor.device_mesh.device_type)
        tensor = on_device.full_tensor()
    return tensor.detach()


def plain_name(name: str) -> str:
    """Return a module's or parameter's name without FSDP1's prefixes."""
    return name.replace("_fsdp_wrapped_module.", "")


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters and persistent buffers by name: sharded ones sharded, tied ones twice.

    Under FSDP1 shards have no names, so all parameters stay gathered during the iteration.
    """
    if not isinstance(model, FullyShardedDataParallel):
        yield from model.state_dict().items()
        return
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        for name, parameter in model.named_parameters(remove_duplicate=False):
            yield plain_name(name), parameter


def checksums(model: nn.Module) -> list[int]:
    """Return a sum of the bits of each weight of this rank; a collective under FSDP1.

    torch's version counters would miss the callbacks that write to ``parameter.data``. A norm would
    lose small changes in rounding.
    """
    sums = [_sum_of_bits(tensor) for _, tensor in named_tensors(model)]
    return torch.stack(sums).tolist()  # one wait for the device


def _sum_of_bits(tensor: Tensor) -> Tensor:
    own = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach().reshape(-1)
    # In words of eight bytes, which torch sums without a copy. A sum that overflows wraps.
    size = own.element_size()
    if own.storage_offset() * size % 8:
        own = own.clone()
    whole = len(own) - len(own) % (8 // size)
    rest = own[whole:].view(INTEGERS[size]).sum(dtype=torch.int64)
    return own[:whole].view(torch.int64).sum() + rest


def total_norm(model: nn.Module) -> Tensor:
    """Return the norm of the gradient over all parameters and ranks; a collective.

    Under FSDP2 it is a DTensor, which ``clip_grads_with_norm_`` needs.
    """
    norm = get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    if isinstance(norm, DTensor):
        return norm.redistribute(placements=[Replicate()] * norm.device_mesh.ndim)
    if isinstance(model, FullyShardedDataParallel):  # this is the norm of the rank's shards
        squares = norm.square()
        distributed.all_reduce(squares)
        norm = squares.sqrt()
    return norm


def exclude_frozen(module: nn.Module, but: str) -> None:
    """Keep frozen parameters out of a module's state dict, because they never change.

    Args:
        module: parameters that are frozen when a state dict is saved or loaded are left out, such
            as those of the reference and the weights under an adapter.
        but: beginning of the names that are kept: a moving reference is frozen, but it moves.
    """
    drop, expect = (partial(hook, but=but) for hook in (_drop_frozen, _expect_no_frozen))
    module.register_state_dict_post_hook(drop)  # type: ignore[no-untyped-call]
    module.register_load_state_dict_post_hook(expect)  # type: ignore[no-untyped-call]


def _drop_frozen(module: nn.Module, state: dict[str, Any], *_: Any, but: str) -> None:
    for name in _frozen(module, but) & state.keys():
        del state[name]


def _expect_no_frozen(module: nn.Module, incompatible: Any, but: str) -> None:
    incompatible.missing_keys[:] = sorted(set(incompatible.missing_keys) - _frozen(module, but))


def _frozen(module: nn.Module, but: str) -> set[str]:
    """Return the names of the parameters that are not trained and do not move."""
    names = {
        plain_name(name)
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if not parameter.requires_grad
    }
    return {name for name in names if not name.startswith(but)}
