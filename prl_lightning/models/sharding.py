"""Spread a model over the ranks, and put its weights together again one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import wrap
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.utils import get_total_norm


@dataclass(frozen=True)
class Sharding:
    """How a strategy shards a model.

    Attributes:
        device: of this rank.
        mesh: of FSDP2; None for FSDP1.
        policy: dtypes of FSDP2. Under bf16-mixed, weights are gathered and computed with in
            bfloat16; shards, sums of gradients and the optimizer stay float32.
        fsdp1_precision: dtypes of FSDP1, None if it changes none.
    """

    device: torch.device
    mesh: DeviceMesh | None
    policy: MixedPrecisionPolicy
    fsdp1_precision: MixedPrecision | None


def sharding_of(module: LightningModule) -> Sharding | None:
    """How the module's strategy shards; None where each rank holds the whole model.

    Args:
        module: attached to a Trainer, or to none yet.

    Raises:
        ValueError: the strategy asks for tensor parallelism.
    """
    trainer = module._trainer
    if trainer is None or not isinstance(trainer.strategy, (FSDPStrategy, ModelParallelStrategy)):
        return None
    strategy, mesh = trainer.strategy, module.device_mesh
    if mesh is not None and mesh["tensor_parallel"].size() > 1:
        raise ValueError(
            f"trainer.strategy: tensor_parallel_size={mesh['tensor_parallel'].size()}, but models "
            "are sharded over data-parallel ranks only. Use `strategy: fsdp2`."
        )
    policy, fsdp1_precision = MixedPrecisionPolicy(), None
    if trainer.precision == "bf16-mixed":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if isinstance(strategy, FSDPStrategy) and strategy.mixed_precision_config is not None:
        # Lightning's rounds gradients before they are added up, and buffers: the frequencies of
        # the rotary positions, whose angles are then off by a radian after some hundred tokens.
        fsdp1_precision = replace(
            strategy.mixed_precision_config, reduce_dtype=torch.float32, buffer_dtype=None
        )
    return Sharding(strategy.root_device, mesh, policy, fsdp1_precision)


def load_on_ranks(
    load: Callable[..., nn.Module], sharding: Sharding | None, keep_root: bool
) -> nn.Module:
    """Load a model as the strategy has it: whole on every rank, or sharded.

    Of a model to be sharded the first rank alone reads the weights and has them all in main memory,
    the others never more than one block of them. To be called by all ranks, in ``configure_model``.

    Args:
        load: makes the model, on the meta device where it is called with ``with_weights=False``.
            Its ``blocks()`` are gathered one after the other; what is in none belongs to the root.
        sharding: how; None for whole models.
        keep_root: keep the root gathered from forward to backward (FSDP2).

    Returns:
        The model, or what replaces it (FSDP1).

    Raises:
        RuntimeError: the first rank could not load it.
    """
    if sharding is None:
        return load()
    model = _load_on_first_rank(load)
    blocks: list[nn.Module] = model.blocks()  # type: ignore[operator]
    inside = {module for block in blocks for module in block.modules()}
    of_root = [module for module in model.modules() if module not in inside]
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child in blocks:
                _take_from_first_rank(child.modules(), sharding.device)
                setattr(parent, name, _shard(child, sharding))
    _take_from_first_rank(of_root, sharding.device)
    model = _shard(model, sharding, reshard_after_forward=not keep_root)
    if sharding.device.type == "cpu":
        # gloo has no mean, and in some versions of torch (2.8) takes the sum in its place.
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)
    return model


def _load_on_first_rank(load: Callable[..., nn.Module]) -> nn.Module:
    failure: list[str | None] = [None]
    if distributed.get_rank() == 0:
        try:
            model = load()
        except Exception as error:
            failure = [f"{type(error).__name__}: {error}"]
            raise
        finally:  # the others wait for this, also where it goes wrong
            distributed.broadcast_object_list(failure)
        return model
    distributed.broadcast_object_list(failure)
    if failure[0] is not None:
        raise RuntimeError(f"the first rank could not load the model: {failure[0]}")
    return load(with_weights=False)


@torch.no_grad()
def _take_from_first_rank(modules: Iterable[nn.Module], device: torch.device) -> None:
    """Put the first rank's parameters and buffers in the place of those at hand, on the device."""
    is_first = distributed.get_rank() == 0
    taken: dict[int, Tensor] = {}
    replaced = []  # alive, so that no two of them have one id
    for module in modules:
        held: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in held:
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in taken:
                    whole = (
                        tensor.detach().to(device).contiguous()
                        if is_first
                        else torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                    )
                    distributed.broadcast(whole, src=0)
                    if isinstance(tensor, nn.Parameter):
                        whole = nn.Parameter(whole, requires_grad=tensor.requires_grad)
                    taken[id(tensor)] = whole
                    replaced.append(tensor)
                tensors[name] = taken[id(tensor)]


def _shard(module: nn.Module, sharding: Sharding, reshard_after_forward: bool = True) -> nn.Module:
    if sharding.mesh is None:
        return wrap(module, mixed_precision=sharding.fsdp1_precision)
    fully_shard(
        module,
        mesh=sharding.mesh["data_parallel"],
        mp_policy=sharding.policy,
        reshard_after_forward=reshard_after_forward,
    )
    return module


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
    """Norm of the gradient over all parameters of all ranks; a collective.

    Under FSDP2 it is a DTensor, as ``clip_grads_with_norm_`` needs it.
    """
    norm = get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    if isinstance(norm, DTensor):
        return norm.redistribute(placements=[Replicate()] * norm.device_mesh.ndim)
    if isinstance(model, FullyShardedDataParallel):  # each rank has only its own part
        squares = norm.square()
        distributed.all_reduce(squares)
        norm = squares.sqrt()
    return norm


def exclude_frozen(module: nn.Module) -> None:
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
