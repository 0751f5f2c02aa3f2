"""Load models and tokenizers from Hugging Face; no code from a model's repository is run."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from prl_lightning.models.causal_lm import LogprobModel
from prl_lightning.models.lora import add_lora


def load_config(name_or_path: str) -> PretrainedConfig:
    """Load the configuration of a Hugging Face id or folder.

    Raises:
        ValueError: the architecture needs remote code.
    """
    return AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)


def why_unreadable(name: str, error: Exception) -> str:
    """Say in one line why a model or dataset cannot be read, and what to do.

    Args:
        name: id of the Hub or folder.
        error: of a library, whose first line is kept.
    """
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().exists():
        return f"there is no such folder or file under {Path.cwd()}. Correct the path."
    return (
        f"{str(error).partition(chr(10))[0].rstrip('.')}. Check the name and the connection; for "
        "what is private or gated, ask for access on its page and run `hf auth login`."
    )


def load_causal_lm(name_or_path: str) -> PreTrainedModel:
    """Load a causal LM with its weights, in torch's default dtype.

    The dtype of the file is ignored. The default is float32, unless the Trainer's precision is one
    such as bf16-true: at a learning rate of 1e-6 most updates of a bfloat16 weight are lost in
    rounding. bf16-mixed is as fast and keeps them.
    """
    return AutoModelForCausalLM.from_pretrained(
        name_or_path, dtype=torch.get_default_dtype(), trust_remote_code=False
    )


def causal_lm_from_config(
    name_or_path: str, dtype: torch.dtype | str | None = None
) -> PreTrainedModel:
    """Build a causal LM with random weights; takes no memory under ``torch.device("meta")``.

    Args:
        name_or_path: Hugging Face id or folder.
        dtype: of the weights; torch's default dtype if None.
    """
    dtype = dtype or torch.get_default_dtype()
    return AutoModelForCausalLM.from_config(
        load_config(name_or_path), dtype=dtype, trust_remote_code=False
    ).eval()


def load_policy(
    name_or_path: str,
    lora: dict[str, Any] | None = None,
    gradient_checkpointing: bool = False,
    compile: bool = False,
    with_weights: bool = True,
) -> LogprobModel:
    """Load a model to train.

    Args:
        name_or_path: Hugging Face id or folder.
        lora: arguments of ``peft.LoraConfig``; if given, only this adapter is trained.
        gradient_checkpointing: see LogprobModel.
        compile: see LogprobModel.
        with_weights: if False, leave every tensor on the meta device.

    Raises:
        ValueError: architecture or adapter cannot work; before the weights are read.
    """
    if with_weights:
        load_policy(name_or_path, lora, with_weights=False)
    with nullcontext() if with_weights else torch.device("meta"):
        causal_lm = (load_causal_lm if with_weights else causal_lm_from_config)(name_or_path)
        if lora is not None:
            add_lora(causal_lm, lora)
        return LogprobModel(causal_lm, gradient_checkpointing, compile)


def load_reference(
    name_or_path: str, compile: bool = False, with_weights: bool = True
) -> LogprobModel:
    """Load a frozen model; for the arguments see ``load_policy``."""
    reference = load_policy(name_or_path, compile=compile, with_weights=with_weights)
    return reference.requires_grad_(False)


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a Hugging Face id or folder."""
    return AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)


def stop_token_ids(
    name_or_path: str, tokenizer: PreTrainedTokenizerBase, more: Sequence[int] = ()
) -> tuple[int, ...]:
    """Return the tokens that end a completion, from the tokenizer and the generation config.

    Args:
        name_or_path: Hugging Face id or folder.
        tokenizer: of the model.
        more: other such tokens, from ``rollout.stop``.

    Raises:
        ValueError: there are none, so every completion would run to the length limit; or the model
            lacks one of ``more``.
    """
    size = load_config(name_or_path).get_text_config().vocab_size
    if unknown := [index for index in more if not 0 <= index < size]:
        raise ValueError(
            f"rollout.stop has the token ids {unknown}, but model.policy={name_or_path!r} has "
            f"{size} tokens, counted from 0. Name others, or write texts in quotation marks."
        )
    try:
        generation_config = GenerationConfig.from_pretrained(name_or_path)
    except OSError:  # the model has no generation_config.json
        generation_config = GenerationConfig.from_model_config(load_config(name_or_path))
    configured = generation_config.eos_token_id
    ids = {*(configured if isinstance(configured, list) else [configured]), *more}
    ids = {tokenizer.eos_token_id, *ids} - {None}
    if not ids:
        raise ValueError(
            f"model.policy={name_or_path!r}: neither the tokenizer nor the generation config has "
            "an end-of-sequence token. Set eos_token_id in the model's generation_config.json, or "
            "name a token in rollout.stop."
        )
    return tuple(sorted(ids))


def max_model_tokens(name_or_path: str) -> int | None:
    """Return the longest row that the architecture takes, or None if it has no limit."""
    config = load_config(name_or_path).get_text_config()
    return getattr(config, "max_position_embeddings", None)
