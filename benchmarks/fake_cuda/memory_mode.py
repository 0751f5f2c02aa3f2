"""What tensors take and what operations read and write, on fake tensors too.

Peaks are sums of what tensors take; an allocator rounds and fragments. Traffic is what each
operation has to read and write once, as if no cache kept anything from one to the next.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from dtypes_and_kernels import ATTENTION, PRODUCTS
from observer import Observer

# What makes tensors without reading any; what reads only the rows that it picks.
EMPTY = {"empty", "empty_like", "empty_strided", "new_empty"}
FILLS = {"zeros", "zeros_like", "new_zeros", "ones_like", "fill_", "zero_", "scalar_tensor"}
PICKS = {"gather", "index_select", "index", "embedding"}
CASTS = {"_to_copy", "copy_", "clone"}
FUSIBLE = {torch.Tag.pointwise, torch.Tag.reduction}


class Memory(Observer):
    """Follow what tensors take, and count what operations read and write.

    Attributes:
        now: bytes of what was made in here and is still there.
        peak: the most that they have been.
        traffic: bytes by kind of operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.traffic: Counter[str] = Counter()
        self._storages: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        inputs, outputs = _tensors((args, kwargs)), _tensors(result)
        before = {x.untyped_storage() for x in inputs}
        is_view = any(x.untyped_storage() in before for x in outputs)
        if not outputs or (is_view and not func._schema.is_mutable):
            return
        for storage in {x.untyped_storage() for x in outputs} - before:
            self._add(storage)
        name = func.overloadpacket.__name__
        self.traffic[_kind(name, func.tags)] += _traffic(name, inputs, outputs)

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._storages:
            self._storages.add(storage)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._remove, storage.nbytes())

    def _remove(self, size: int) -> None:
        self.now -= size


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def size_of(tensors: Iterable[Tensor]) -> int:
    """Of an expanded tensor, what is there."""
    return sum(min(x.numel() * x.element_size(), x.untyped_storage().nbytes()) for x in tensors)


def _traffic(name: str, inputs: list[Tensor], outputs: list[Tensor]) -> int:
    written = size_of(outputs)
    if name in EMPTY:
        return 0
    if name in FILLS:
        return written
    if name in PICKS:
        return 2 * written
    if name == "scatter_add_":
        return 3 * size_of(inputs[2:])
    if name == "copy_":
        return written + size_of(inputs[1:])
    return written + size_of(inputs)


def _kind(name: str, tags: Iterable[torch.Tag]) -> str:
    if name in PRODUCTS:
        return "products"
    if ATTENTION in name:
        return "attention"
    return "elementwise" if name in CASTS or not FUSIBLE.isdisjoint(tags) else "other"


def in_gib(size: float) -> float:
    return round(size / 2**30, 2)


def shares(memory: Memory) -> dict[str, float]:
    """Of the traffic, by kind of operation."""
    total = memory.traffic.total()
    return {kind: round(size / total, 3) for kind, size in memory.traffic.most_common()}
