"""Load the policy and the reference, and turn a causal LM into token log-probabilities."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

try:
    from transformers.core_model_loading import revert_weight_conversion
except ImportError:  # transformers 4, whose modules are named as their files are
    revert_weight_conversion = None

from prl_lightning.functional import token_logprobs
from prl_lightning.models.experts import use_autocast_experts
from prl_lightning.models.lora import add_lora, merged
from prl_lightning.models.packed_attention import disable_cudnn_attention, pack_attention
from prl_lightning.models.packing import Packing
from prl_lightning.models.sharding import named_tensors
from prl_lightning.types import RolloutBatch

# Fields by which an architecture changes its logits after the output head.
LOGIT_TRANSFORMS = {"final_logit_softcapping": None, "logit_scale": 1.0, "logits_scaling": 1.0}


class LogprobModel(nn.Module):
    """A causal LM whose forward returns log-probabilities instead of logits.

    Rows are packed, so that neither padding nor a group's prompt again is computed, unless the
    architecture mixes tokens by other means than attention. The output head is applied to
    completion tokens alone and in chunks, so logits of the size (tokens, V) never exist. It is a
    module of its own so that a strategy can shard it as the root of its parameters: everything it
    needs is gathered by calling it.

    Args:
        causal_lm: a Hugging Face causal language model.
        gradient_checkpointing: keep only the input of each block and compute the rest anew in the
            backward pass.
        compile: compile each block, once for all shapes.

    Raises:
        ValueError: the architecture transforms its logits after the output head.
    """

    def __init__(
        self,
        causal_lm: PreTrainedModel,
        gradient_checkpointing: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__()
        config = causal_lm.config.get_text_config()
        for name, neutral in LOGIT_TRANSFORMS.items():
            if getattr(config, name, neutral) not in (neutral, None):
                raise ValueError(
                    f"model.policy: the architecture {config.model_type!r} changes its logits by "
                    f"{name}={getattr(config, name)}, which the chunked output head does not do. "
                    "Use an architecture without it."
                )
        if getattr(causal_lm.get_output_embeddings(), "bias", None) is not None:
            raise ValueError("model.policy: an output head with a bias is not supported.")
        disable_cudnn_attention()
        self.causal_lm = causal_lm
        self.is_packed = pack_attention(causal_lm)
        use_autocast_experts(causal_lm)
        if gradient_checkpointing:
            # Not by Hugging Face's switch, which works in train mode alone: with dropout the
            # trainer's policy would not be the one that the engine samples from.
            for block in self.blocks():
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        if compile:
            for block in self.blocks():
                block.compile(dynamic=True)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LogprobModel:
        """Move or cast, but leave the precision of buffers alone.

        ``precision: bf16-true`` casts a whole module. The rotary frequencies would be rounded with
        it, to angles that are off by a radian after some hundred tokens; the engine keeps them.
        """
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in self.named_buffers():
            if buffer.dtype != before[name].dtype:
                parent, _, own_name = name.rpartition(".")
                self.get_submodule(parent)._buffers[own_name] = before[name].to(buffer.device)
        return self

    def blocks(self) -> list[nn.Module]:
        """The decoder layers, or whatever the architecture wants to be kept in one piece."""
        names = set(self.causal_lm._no_split_modules or ())
        return [module for module in self.modules() if type(module).__name__ in names]

    def forward(self, batch: RolloutBatch) -> tuple[Tensor, Tensor]:
        """Score the completions of a batch.

        Nothing here waits for a GPU: every size is that of a tensor of ``batch.packing``.

        Args:
            batch: ``packing`` is read, or ``input_ids`` if the architecture cannot be packed;
                the logits are divided by ``temperature``.

        Returns:
            Log-probabilities of the completion tokens and entropies of the distributions they
            were drawn from, both (B, T), float32, zero outside the mask.
        """
        packing = batch.packing
        hidden = self._packed(packing) if self.is_packed else self._padded(batch)
        head = self.causal_lm.get_output_embeddings().weight
        logprobs, entropy = token_logprobs(hidden, head, packing.targets, batch.temperature)
        zeros = logprobs.new_zeros(batch.completion_mask.numel())
        shape = batch.completion_mask.shape
        return (
            zeros.index_copy(0, packing.cells, logprobs).view(shape),
            zeros.index_copy(0, packing.cells, entropy).view(shape),
        )

    def _body(self) -> nn.Module:
        """All but the head. Gemma 3 of transformers 4 has no module of its base model's name."""
        base = self.causal_lm.base_model
        return self.causal_lm.model if base is self.causal_lm else base

    def _packed(self, packing: Packing) -> Tensor:
        """Hidden states that predict the completion tokens, (completion tokens, H)."""
        output = self._body()(
            input_ids=packing.input_ids,
            position_ids=packing.position_ids,
            use_cache=False,
            packing=packing,
        )
        return output.last_hidden_state[0, packing.predictors]

    def _padded(self, batch: RolloutBatch) -> Tensor:
        output = self._body()(input_ids=batch.input_ids, use_cache=False)
        width = batch.completion_mask.shape[1]
        row, token = batch.packing.cells // width, batch.packing.cells % width
        # The hidden state one position earlier predicts a token.
        return output.last_hidden_state[row, batch.prompt_lengths[row] + token - 1]


def named_weights(
    model: nn.Module, dtype: torch.dtype | None = None, as_in_file: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Every weight under its Hugging Face name, whole, as an engine or a file wants it.

    Sharded weights are gathered one by one while this is iterated over, by all ranks in the same
    order. A tied output head comes as well: an engine may keep its own packed copy of it.

    Args:
        model: a LogprobModel, with an adapter or without, as the strategy has wrapped it.
        dtype: of the matrices, by default their own; vectors keep theirs.
        as_in_file: under the names, and in the pieces, that a published model's files have;
            transformers keeps the experts of a mixture in one tensor.

    Yields:
        Name and tensor.
    """
    for full_name, tensor in merged(model, named_tensors(model), dtype):
        name = full_name.removeprefix("causal_lm.")
        if as_in_file and revert_weight_conversion is not None:
            yield from revert_weight_conversion(model.causal_lm, {name: tensor}).items()
        else:
            yield name, tensor


def load_causal_lm(name_or_path: str) -> PreTrainedModel:
    """Load a causal LM from a Hugging Face id or folder; no remote code is run.

    In torch's default dtype, whatever the file has. That is float32, unless the Trainer's precision
    is one such as bf16-true: at a learning rate of 1e-6 most updates of a bfloat16 weight are lost
    in rounding, while bf16-mixed computes as fast.
    """
    return AutoModelForCausalLM.from_pretrained(
        name_or_path, dtype=torch.get_default_dtype(), trust_remote_code=False
    )


def empty_causal_lm(name_or_path: str) -> PreTrainedModel:
    """The model of ``load_causal_lm`` before it has weights; costs nothing on the meta device."""
    config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        config, dtype=torch.get_default_dtype(), trust_remote_code=False
    )
    return model.eval()


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
        lora: train an adapter with these arguments of ``peft.LoraConfig`` instead of all weights.
        gradient_checkpointing: see LogprobModel.
        compile: see LogprobModel.
        with_weights: False leaves every tensor on the meta device.
    """
    with nullcontext() if with_weights else torch.device("meta"):
        causal_lm = (load_causal_lm if with_weights else empty_causal_lm)(name_or_path)
        if lora is not None:
            add_lora(causal_lm, lora)
        return LogprobModel(causal_lm, gradient_checkpointing, compile)


def load_reference(
    name_or_path: str, compile: bool = False, with_weights: bool = True
) -> LogprobModel:
    """Load a model that is not trained.

    Args:
        name_or_path: Hugging Face id or folder.
        compile: see LogprobModel.
        with_weights: see ``load_policy``.
    """
    reference = load_policy(name_or_path, compile=compile, with_weights=with_weights)
    return reference.requires_grad_(False)


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a Hugging Face id or folder; no remote code is run."""
    return AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)


def stop_token_ids(name_or_path: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Tokens that end a completion: the tokenizer's and those of the generation config.

    Raises:
        ValueError: neither names one, so no completion would ever end by itself.
    """
    ids = {tokenizer.eos_token_id}
    try:
        generation_config = GenerationConfig.from_pretrained(name_or_path)
    except OSError:  # a model without such a file
        generation_config = GenerationConfig.from_model_config(
            AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
        )
    configured = generation_config.eos_token_id
    ids.update(configured if isinstance(configured, list) else [configured])
    ids.discard(None)
    if not ids:
        raise ValueError(
            f"model.policy={name_or_path!r}: no end-of-sequence token in the tokenizer or in the "
            "generation config. Set eos_token_id in its generation_config.json."
        )
    return tuple(sorted(ids))


def max_model_tokens(name_or_path: str) -> int | None:
    """Longest row the architecture can take; None where it names no limit."""
    config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False).get_text_config()
    return getattr(config, "max_position_embeddings", None)
