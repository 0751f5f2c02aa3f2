"""Check a sharded checkpoint for code before it is loaded: torch unpickles parts of it."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

METADATA = ".metadata"
# The classes that torch itself pickles into it: descriptions of tensors and of their storage.
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
    """Refuse a folder of torch.distributed.checkpoint if loading it could run code.

    torch (2.13) ignores ``weights_only`` for ``.metadata`` and for the options of the optimizers:
    it unpickles any object in them. It respects ``weights_only`` for tensors and for checkpoints in
    one file, so they are not checked here.

    Args:
        checkpoint: a folder; a file is not checked.

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
            f"{checkpoint} is not loaded because it could run code: {error}. If you trust its "
            "source, load it with --weights_only=false in prl fit or prl validate."
        ) from error
