"""Write a policy as a Hugging Face folder, from a running trainer or from a checkpoint."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from torch import Tensor
from transformers.utils import cached_file

from prl_lightning.models.causal_lm import named_weights
from prl_lightning.models.loading import causal_lm_from_config, load_policy, load_tokenizer
from prl_lightning.runs.checkpoint_files import read_checkpoint, read_weights
from prl_lightning.runs.files import refuse_existing

POLICY = "policy."


def export_checkpoint(ckpt_path: str, out: str, dtype: str | None = None) -> None:
    """Write the policy of a checkpoint as a Hugging Face folder.

    Args:
        ckpt_path: a checkpoint of ``prl fit``, one file or a sharded folder.
        out: the folder to create.
        dtype: of the exported weights, such as bfloat16; by default as they were trained.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        FileExistsError: ``out`` exists.
        ValueError: the checkpoint was not written by this package.
        pickle.UnpicklingError: loading it could run code.
    """
    refuse_existing(Path(out), "out")
    torch_dtype(dtype)
    path = Path(ckpt_path)
    if not path.exists():
        raise FileNotFoundError(f"ckpt_path={ckpt_path}: there is no such checkpoint.")
    checkpoint = read_checkpoint(path)
    saved = checkpoint.get("hyper_parameters", {})
    if "policy" not in saved:
        raise ValueError(
            f"ckpt_path={ckpt_path} has no policy. Use a checkpoint that `prl fit` wrote."
        )
    policy = load_policy(saved["policy"], saved["lora"])
    trained = {POLICY + name: p.data for name, p in policy.named_parameters() if p.requires_grad}
    weights = read_weights(path, checkpoint, trained)
    for name, tensor in trained.items():
        tensor.copy_(weights[name])
    save_policy(dict(named_weights(policy)), saved["policy"], Path(out), dtype)
    print(f"{out}: the policy of {ckpt_path}")


def torch_dtype(name: str | None) -> torch.dtype | None:
    """Return the floating-point dtype of this name.

    Raises:
        ValueError: torch has none of this name.
    """
    dtype = None if name is None else getattr(torch, name, None)
    if name is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype={name}: use a dtype such as bfloat16, float16 or float32.")
    return dtype


def save_policy(
    weights: dict[str, Tensor], name_or_path: str, folder: Path, dtype: str | None = None
) -> None:
    """Write weights, configuration and tokenizer so that ``from_pretrained`` and vLLM load them.

    The folder is written under another name and renamed when it is complete.

    Args:
        weights: all weights, by their Hugging Face names.
        name_or_path: the model that was trained; configuration and tokenizer are copied from it.
        folder: to be created.
        dtype: of the weights in it, by default unchanged.

    Raises:
        FileExistsError: ``folder`` exists.
    """
    refuse_existing(folder, "folder")
    target = torch_dtype(dtype) or next(iter(weights.values())).dtype
    with torch.device("meta"):
        model = causal_lm_from_config(name_or_path, target)
    cast = {k: v.to(target) if v.is_floating_point() else v for k, v in weights.items()}
    model.load_state_dict(cast, assign=True)
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
