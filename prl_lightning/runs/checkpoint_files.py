"""Read checkpoints: one file, or the folder that ``fsdp2`` writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict_loader import load as load_shards

from prl_lightning.runs.unpickling import refuse_code


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read everything but the weights of a folder; those of a file are mapped, not loaded.

    Args:
        path: of a checkpoint that exists.

    Raises:
        pickle.UnpicklingError: loading it could run code.
    """
    refuse_code(path)
    file = path / "meta.pt" if path.is_dir() else path
    return torch.load(file, map_location="cpu", weights_only=True, mmap=True)


def read_weights(
    path: Path, checkpoint: dict[str, Any], weights: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return a checkpoint's weights.

    Args:
        path: of the checkpoint.
        checkpoint: what ``read_checkpoint`` has returned for it.
        weights: those that are needed, by name. The shards of a folder are read into these tensors,
            and the rest of the folder is skipped.
    """
    if not path.is_dir():
        return checkpoint["state_dict"]
    load_shards({"state_dict": weights}, checkpoint_id=path, no_dist=True)
    return weights
