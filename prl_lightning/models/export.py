"""A policy as a Hugging Face folder, from a running trainer or from a checkpoint of either kind."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict_loader import load as load_sharded
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import cached_file

from prl_lightning.models.causal_lm import load_policy, load_tokenizer, named_weights
from prl_lightning.runs.unpickling import refuse_code

POLICY = "policy."


def export_checkpoint(ckpt_path: str, out: str, dtype: str | None = None) -> None:
    """Write the policy of a checkpoint as a Hugging Face folder.

    Args:
        ckpt_path: a checkpoint of ``prl fit``, one file or a sharded folder.
        out: the folder to make.
        dtype: of the weights in it, such as bfloat16; by default as they were trained.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        FileExistsError: there is something at ``out``.
        ValueError: the checkpoint was not written by this package.
        pickle.UnpicklingError: loading it could run code.
    """
    refuse_existing(Path(out), "out")
    torch_dtype(dtype)
    path = Path(ckpt_path)
    if not path.exists():
        raise FileNotFoundError(f"ckpt_path={ckpt_path}: there is no such checkpoint.")
    refuse_code(path)
    is_sharded = path.is_dir()
    checkpoint: dict[str, Any] = torch.load(
        path / "meta.pt" if is_sharded else path, map_location="cpu", weights_only=True, mmap=True
    )
    origin = checkpoint.get("policy_origin")
    if origin is None:
        raise ValueError(f"ckpt_path={ckpt_path}: does not name its policy, as `prl fit` does.")
    policy = load_policy(origin["name"], origin["lora"])
    trained = {POLICY + name: p.data for name, p in policy.named_parameters() if p.requires_grad}
    if is_sharded:
        # Reads into the policy's own tensors; what else is in the checkpoint stays there.
        load_sharded({"state_dict": trained}, checkpoint_id=path, no_dist=True)
    else:
        for name, tensor in trained.items():
            tensor.copy_(checkpoint["state_dict"][name])
    save_policy(dict(named_weights(policy)), origin["name"], Path(out), dtype)
    print(f"{out}: the policy of {ckpt_path}")


def refuse_existing(folder: Path, field: str) -> None:
    """Nothing is written over.

    Args:
        folder: to be made.
        field: where it was named, for the message.

    Raises:
        FileExistsError: there is something.
    """
    if folder.exists():
        raise FileExistsError(f"{field}={folder} exists: name another folder, or remove it.")


def torch_dtype(name: str | None) -> torch.dtype | None:
    """A floating-point type by its name.

    Raises:
        ValueError: there is none of that name.
    """
    found = None if name is None else getattr(torch, name, None)
    if name is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ValueError(f"dtype={name}: use one such as bfloat16, float16 or float32.")
    return found


def save_policy(
    weights: dict[str, Tensor], name_or_path: str, folder: Path, dtype: str | None = None
) -> None:
    """Write weights, configuration and tokenizer so that ``from_pretrained`` and vLLM load them.

    The folder appears when it is complete.

    Args:
        weights: all of them, under their Hugging Face names.
        name_or_path: the model that was trained; configuration and tokenizer are its own.
        folder: to be made.
        dtype: of the weights in it; by default as they are.

    Raises:
        FileExistsError: there is something at ``folder``.
    """
    refuse_existing(folder, "folder")
    target = torch_dtype(dtype) or next(iter(weights.values())).dtype
    config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
    config.dtype = target
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict({k: _as(v, target) for k, v in weights.items()}, assign=True)
    model.tie_weights()
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    load_tokenizer(name_or_path).save_pretrained(part)
    recommended = cached_file(
        name_or_path, "generation_config.json", _raise_exceptions_for_missing_entries=False
    )
    if recommended:
        shutil.copyfile(recommended, part / "generation_config.json")
    os.replace(part, folder)


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
