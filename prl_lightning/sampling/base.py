"""The sampler protocol: any engine that draws completions and takes new weights."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, distributed

from prl_lightning.types import Completion, Prompt

# Told how many more prompts are done, and how many tokens more there are.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class SamplingConfig:
    """How to draw completions.

    Attributes:
        n: completions a prompt.
        temperature: the logits are divided by it.
        top_p: smallest set of tokens with this mass is sampled from. Training samples from the
            policy itself, so there it is 1.
        max_new_tokens: limit of a completion.
        stop_token_ids: a completion ends at, and includes, the first of these.
    """

    n: int
    temperature: float
    max_new_tokens: int
    stop_token_ids: tuple[int, ...]
    top_p: float = 1.0


class Sampler(ABC):
    """An engine. One is made by the configuration, started once, and then reused every epoch.

    Attributes:
        dtype: the precision it computes in; "float32" is held to a smaller engine gap.
        follows_trainer: whether ``follow`` sets the dtype, because the user named none.
        reads_files: whether it knows weights by the names of a published model's files, and not by
            those of transformers' modules; they differ for mixtures of experts.
        is_concurrent: whether ``generate`` may run in a thread while the trainer trains.
    """

    dtype: str
    reads_files = False
    follows_trainer = False
    is_concurrent = False

    def follow(self, precision: str) -> None:
        """Take the dtype that suits the trainer and this machine, if none was asked for.

        Called before ``start``. On a GPU that is the trainer's own half precision; on a CPU always
        float32, which is as fast there and the most exact.

        Args:
            precision: the Trainer's, such as "bf16-mixed".
        """
        if self.follows_trainer:
            half = {"bf16": "bfloat16", "16": "float16"}.get(precision.partition("-")[0])
            self.dtype = half if half and torch.cuda.is_available() else "float32"

    @property
    def weights_dtype(self) -> torch.dtype | None:
        """Dtype in which weights are handed over; None, as they are, where it has another name."""
        return getattr(torch, self.dtype, None)

    def identity(self) -> str:
        """What its completions depend on, beside weights, prompt and ``SamplingConfig``.

        An evaluation takes an earlier one's completions where this is the same.
        """
        return f"{type(self).__name__} {self.dtype}"

    def missing_requirements(self) -> list[str]:
        """What this machine lacks for it, each with its mend; asked before anything is loaded."""
        return []

    @abstractmethod
    def start(self, model: str, max_model_tokens: int) -> None:
        """Build the engine for a model, before the first ``load_weights``.

        Args:
            model: Hugging Face id or folder; only its configuration needs to be read, the weights
                come from the trainer.
            max_model_tokens: longest prompt plus completion there will be.
        """

    @abstractmethod
    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Replace the engine's weights by the trainer's.

        Args:
            weights: (name, tensor) under the names of the Hugging Face model (see
                ``reads_files``), matrices in this sampler's dtype; a tied output head is sent as
                well, under its own name. To be read to its end on every rank, because each step of
                it may gather a sharded tensor.
        """

    @abstractmethod
    def generate(
        self, prompts: Sequence[Prompt], config: SamplingConfig, on_progress: Progress | None = None
    ) -> list[list[Completion]]:
        """Draw ``config.n`` completions for each prompt, in the order of the prompts.

        Sample j of a prompt draws from a generator of its own, seeded by ``prompt.seed`` + j, so
        its random numbers do not depend on the other prompts or on earlier calls. Its tokens do
        not either on a CPU. On a GPU the kernels round differently at another batch size, and one
        token that differs changes all later ones: equal seeds give equally distributed completions
        there, and equal ones only in a batch-invariant engine (``VLLMSampler.batch_invariant``).
        The log-probabilities returned are of the distribution that was sampled from.

        Args:
            prompts: to complete.
            config: how.
            on_progress: called in this process while it goes on, from any thread.
        """

    @abstractmethod
    def stop(self) -> None:
        """Give the engine's memory back; ``start`` may be called again.

        Also called after a ``start`` that has failed and, where ``is_concurrent``, while
        ``generate`` runs in another thread, which it ends.
        """


def local_rank() -> int:
    """Place of this process among the trainer's on its machine, however they were launched."""
    if not distributed.is_initialized():
        return 0
    return distributed.get_node_local_rank(int(os.environ.get("SLURM_LOCALID", 0)))
