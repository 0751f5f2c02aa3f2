"""What of a computation a GPU would have to be waited for, found on any device.

A host that reads a value, or a size that depends on values, stands still until the GPU has done
all it was told before; meanwhile nothing new is launched. On a CPU such operations are the same
ones and can be seen, with the line of the package that calls them.
"""

from __future__ import annotations

import traceback
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import prl_lightning
from observer import Observer

PACKAGE = Path(prl_lightning.__file__).parent
READS = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "bincount"}
READS |= {"_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive"}
INDEXINGS = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_"}
COPIES = {"_to_copy", "copy_"}
# What never reaches the dispatcher where the tensor is on the CPU already.
METHODS = {Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.new_tensor}
FACTORIES = {torch.tensor, torch.as_tensor}


class Waits(Observer):
    """Record what waits for a GPU while this is entered.

    Attributes:
        found: the operation and the package's innermost line at each wait, in their order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._methods = _Methods(self.found)

    def __enter__(self) -> Waits:
        self._methods.__enter__()
        super().__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, trace)
        self._methods.__exit__(kind, error, trace)

    def see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        name = func.overloadpacket.__name__
        if name in READS or _has_unknown_size(func, name, args, kwargs):
            self.found.append(f"{name} at {package_line(traceback.extract_stack())}")
        if name in COPIES and not kwargs.get("non_blocking"):
            source = args[1] if name == "copy_" else args[0]
            if source.device != result.device:
                self.found.append(f"{name} at {package_line(traceback.extract_stack())}")


class _Methods(TorchFunctionMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        # Without a device, a tensor of numbers is a scalar on the CPU that a kernel takes along.
        copies = func in FACTORIES and kwargs.get("device") is not None
        if copies or (func in METHODS and args[0].device.type == "cpu"):
            self.found.append(f"{func.__name__} at {package_line(traceback.extract_stack())}")
        return func(*args, **kwargs)


def _has_unknown_size(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if func is torch.ops.aten.repeat_interleave.Tensor:
        return kwargs.get("output_size") is None
    indices = args[1] if name in INDEXINGS else ()
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


def package_line(frames: traceback.StackSummary) -> str:
    """The innermost line of the package."""
    lines = [
        f"{Path(frame.filename).relative_to(PACKAGE)}:{frame.lineno}"
        for frame in frames
        if Path(frame.filename).is_relative_to(PACKAGE)
    ]
    return lines[-1] if lines else "a line outside the package"
