"""Look through a sharded checkpoint before it is loaded: torch unpickles what is in it."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

METADATA = ".metadata"
# What torch itself writes into it: descriptions of tensors, and where they lie.
HARMLESS = {
    *(("torch.distributed.checkpoint.metadata", name) for name, kind in vars(dcp).items()
      if isinstance(kind, type) and kind.__module__ == dcp.__name__),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
    ("collections", "OrderedDict"),
}  # fmt: skip


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in HARMLESS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def refuse_code(checkpoint: Path) -> None:
    """Refuse a folder of torch.distributed.checkpoint with anything but values in it.

    ``weights_only`` reaches neither its ``.metadata`` nor the options of its optimizers, which
    torch (2.13) unpickles whatever they are. The tensors and a checkpoint of one file are left to
    torch, which does heed it.

    Args:
        checkpoint: a folder; nothing is looked at where it is none.

    Raises:
        pickle.UnpicklingError: loading it could run code.
    """
    if not (checkpoint / METADATA).is_file():
        return
    try:
        with (checkpoint / METADATA).open("rb") as file:
            metadata: Metadata = _Unpickler(file).load()
        for index, where in metadata.storage_data.items():
            if isinstance(metadata.state_dict_metadata.get(index.fqn), TensorStorageMetadata):
                continue
            if where.transform_descriptors:
                raise pickle.UnpicklingError(f"{index.fqn} is encoded")
            with (checkpoint / where.relative_path).open("rb") as file:
                file.seek(where.offset)
                torch.load(io.BytesIO(file.read(where.length)), weights_only=True)
    except pickle.UnpicklingError as error:
        raise pickle.UnpicklingError(
            f"{checkpoint} is not loaded, for it could run code: {error}. If you know where it is "
            "from, prl fit and prl validate load it all the same with --weights_only=false."
        ) from error
