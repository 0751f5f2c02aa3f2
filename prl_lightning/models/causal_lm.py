"""LogprobModel: token log-probabilities of a causal LM; and its weights by Hugging Face name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

try:
    from transformers.core_model_loading import revert_weight_conversion
except ImportError:  # transformers 4: its modules have the names of the files
    revert_weight_conversion = None

from prl_lightning.functional import token_logprobs
from prl_lightning.models.experts import use_autocast_experts
from prl_lightning.models.lora import merged
from prl_lightning.models.output_head import logit_transform
from prl_lightning.models.packed_attention import disable_cudnn_attention, pack_attention
from prl_lightning.models.packing import Packing
from prl_lightning.models.sharding import named_tensors
from prl_lightning.models.tied_weights import embed_tied, is_tied
from prl_lightning.types import RolloutBatch


class LogprobModel(nn.Module):
    """A causal LM whose forward returns log-probabilities instead of logits.

    Rows are packed: padding is not computed, and the prompt of a group is computed once. Only
    architectures that mix tokens outside of attention are computed in padded rows. The output head
    is applied to the completion tokens alone and in blocks, so logits of shape (tokens, V) never
    exist. It is one module, so that a strategy can shard it as the root of its parameters and each
    call gathers what it needs.

    Args:
        causal_lm: a Hugging Face causal language model.
        gradient_checkpointing: keep only the input of each block; recompute the rest in the
            backward pass.
        compile: compile each block, once for all shapes.

    Raises:
        ValueError: the architecture gets its logits by more than a matrix, scaling and capping.
    """

    def __init__(
        self,
        causal_lm: PreTrainedModel,
        gradient_checkpointing: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        self.logit_transform = logit_transform(causal_lm, self._body())
        disable_cudnn_attention()
        self.is_packed = pack_attention(causal_lm, self._body())
        use_autocast_experts(causal_lm)
        for block in self.blocks():
            if gradient_checkpointing:
                # Hugging Face's own switch works in train mode only. With dropout, the policy would
                # then differ from the one that the engine samples from.
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
            if compile:
                block.compile(dynamic=True)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LogprobModel:
        """Move or cast the module, but keep the dtype of its buffers.

        ``precision: bf16-true`` casts a whole module. Rounded rotary frequencies give angles that
        are wrong by a radian after some hundred tokens, and the engine does not round them.
        """
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in self.named_buffers():
            if buffer.dtype != before[name].dtype:
                parent, _, own_name = name.rpartition(".")
                self.get_submodule(parent)._buffers[own_name] = before[name].to(buffer.device)
        return self

    def blocks(self) -> list[nn.Module]:
        """Return the decoder layers, or other modules that the architecture forbids to split."""
        names = set(self.causal_lm._no_split_modules or ())
        return [module for module in self.modules() if type(module).__name__ in names]

    def forward(self, batch: RolloutBatch) -> tuple[Tensor, Tensor]:
        """Score the completions of a batch.

        The host never waits for a GPU here: every size is that of a tensor of ``batch.packing``.

        Args:
            batch: ``packing`` is read, or ``input_ids`` if the architecture cannot be packed;
                the logits are divided by ``temperature``.

        Returns:
            Log-probabilities of the completion tokens, and entropies of the distributions that
            they were sampled from; both (B, T), float32, zero outside the mask.
        """
        packing, mask = batch.packing, batch.completion_mask
        head = self.causal_lm.get_output_embeddings().weight
        if not self.is_packed:
            hidden = self._padded(batch)
        elif is_tied(self.causal_lm):
            embedded, head = embed_tied(self.causal_lm.get_input_embeddings(), packing.input_ids)
            hidden = self._packed(packing, inputs_embeds=embedded)
        else:
            hidden = self._packed(packing, input_ids=packing.input_ids)
        logprobs, entropy = token_logprobs(
            hidden, head, packing.targets, batch.temperature, **self.logit_transform
        )
        zeros = logprobs.new_zeros(mask.numel())
        return (
            zeros.index_copy(0, packing.cells, logprobs).view_as(mask),
            zeros.index_copy(0, packing.cells, entropy).view_as(mask),
        )

    def _body(self) -> nn.Module:
        """Return the model without its head.

        Gemma 3 in transformers 4 has no module with the name of its base model.
        """
        base = self.causal_lm.base_model
        return self.causal_lm.model if base is self.causal_lm else base

    def _packed(self, packing: Packing, **inputs: Tensor) -> Tensor:
        """Return the hidden states that predict the sampled tokens, (C, H).

        Args:
            packing: of the batch.
            inputs: ``input_ids`` or ``inputs_embeds`` of the long row.
        """
        output = self._body()(
            **inputs, position_ids=packing.position_ids, use_cache=False, packing=packing
        )
        return output.last_hidden_state[0, packing.predictors]

    def _padded(self, batch: RolloutBatch) -> Tensor:
        """Return the same as ``_packed``, computed in padded rows."""
        output = self._body()(input_ids=batch.input_ids, use_cache=False)
        width = batch.completion_mask.shape[1]
        row, token = batch.packing.cells // width, batch.packing.cells % width
        # The hidden state one position earlier predicts a token.
        return output.last_hidden_state[row, batch.prompt_lengths[row] + token - 1]


def named_weights(
    model: nn.Module, dtype: torch.dtype | None = None, as_in_file: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Yield every weight, unsharded, with its Hugging Face name, for an engine or a file.

    Sharded weights are gathered one by one during the iteration, so all ranks must iterate in the
    same order. A tied output head is included: an engine may keep its own packed copy of it.

    Args:
        model: a LogprobModel, with or without an adapter, as the strategy wrapped it.
        dtype: of the matrices, by default unchanged; vectors keep theirs.
        as_in_file: use the names and the pieces of a published model's files. They differ for
            mixtures of experts, which transformers keeps in one tensor.

    Yields:
        Name and tensor.
    """
    for full_name, tensor in merged(model, named_tensors(model), dtype):
        name = full_name.removeprefix("causal_lm.")
        if as_in_file and revert_weight_conversion is not None:
            yield from revert_weight_conversion(model.causal_lm, {name: tensor}).items()
        else:
            yield name, tensor
