"""Sampler: the interface of engines that sample completions and take new weights."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, distributed

from prl_lightning.types import Completion, Prompt

MIN_TEMPERATURE = 0.01  # vLLM would raise a lower one to this, except 0

# Called with the groups finished since the last call, by the index of their prompt, and with the
# number of tokens sampled since then.
Progress = Callable[[Mapping[int, list[Completion]], int], None]


@dataclass(frozen=True)
class SamplingConfig:
    """How to sample completions.

    Attributes:
        n: completions per prompt.
        temperature: divides the logits. 0 is greedy: always the most likely token, so all ``n``
            completions of a prompt are one.
        max_new_tokens: length limit of a completion.
        stop_token_ids: a completion ends with the first of these tokens, which it includes.
        top_p: sample from the smallest set of tokens with this probability mass. Training samples
            from the policy itself, so there it is 1.
        stop_texts: a completion also ends with the token that completes one of these texts. Special
            tokens are part of the text.
    """

    n: int
    temperature: float
    max_new_tokens: int
    stop_token_ids: tuple[int, ...]
    top_p: float = 1.0
    stop_texts: tuple[str, ...] = ()

    @property
    def num_distinct(self) -> int:
        """Completions per prompt to sample; the others are copies."""
        return self.n if self.temperature else 1

    @property
    def logprob_temperature(self) -> float:
        """Temperature of the log-probabilities: at 0 they would all be 0, so it is 1 there."""
        return self.temperature or 1.0


class Sampler(ABC):
    """An engine. It is configured once, started once and reused in every epoch.

    Attributes:
        dtype: precision of its computations; "float32" tightens the limit of the engine gap.
        follows_trainer: whether ``follow`` sets the dtype, because the user chose none.
        reads_files: whether it takes weights by the names in a published model's files instead of
            the names of transformers' modules; they differ for mixtures of experts.
        is_concurrent: whether ``generate`` may run in a thread while the trainer trains.
        loads_in_thread: whether ``load_weights`` may, too, with tensors in main memory.
        ranks_per_engine: number of neighbouring ranks of the trainer that share one engine. All of
            them call each method, ``generate`` also without prompts.
    """

    dtype: str
    reads_files = False
    follows_trainer = False
    is_concurrent = False
    loads_in_thread = False
    ranks_per_engine = 1

    def follow(self, precision: str, on_gpu: bool | None = None) -> None:
        """Set the dtype that suits the trainer and the hardware, unless the user chose one.

        Called before ``start``. On a GPU, it is the trainer's half precision if it has one. On a
        CPU, it is float32, which is as fast there and the most exact.

        Args:
            precision: of the Trainer, such as "bf16-mixed".
            on_gpu: whether the engine runs on a GPU; by default, whether there is one here.
        """
        on_gpu = torch.cuda.is_available() if on_gpu is None else on_gpu
        if self.follows_trainer:
            half = {"bf16": "bfloat16", "16": "float16"}.get(precision.partition("-")[0])
            self.dtype = half if half and on_gpu else "float32"

    @property
    def weights_dtype(self) -> torch.dtype | None:
        """Dtype of the weights to load; None leaves them unchanged, if torch has no such dtype."""
        return getattr(torch, self.dtype, None)

    def identity(self) -> str:
        """Return what completions depend on besides weights, prompt and ``SamplingConfig``.

        An evaluation reuses cached completions if this is equal.
        """
        return f"{type(self).__name__} {self.dtype}"

    def missing_requirements(self) -> list[str]:
        """Return what the machine lacks, with the fix; checked before anything is loaded."""
        return []

    def refuse_model(self, model: str, max_model_tokens: int) -> None:
        """Raise if the engine cannot sample from an architecture; before anything is loaded.

        Args:
            model: Hugging Face id or folder.
            max_model_tokens: see ``start``.

        Raises:
            ValueError: with the architecture and the fix.
        """
        return  # an engine that takes them all

    @abstractmethod
    def start(self, model: str, max_model_tokens: int) -> None:
        """Build the engine for a model, before the first ``load_weights``.

        Args:
            model: Hugging Face id or folder. Only the configuration is needed: the trainer sends
                the weights.
            max_model_tokens: largest sum of prompt and completion tokens.
        """

    @abstractmethod
    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Replace the engine's weights by the trainer's.

        Args:
            weights: (name, tensor) with Hugging Face names (see ``reads_files``), matrices in this
                sampler's dtype. A tied output head is included under its own name. Every rank must
                iterate to the end, because each item may be gathered from all ranks.
        """

    def release_weights(self) -> bool:
        """Free the weights until the next ``load_weights``, if that needs no more time than before.

        What was computed with them, such as cached keys and values, may be freed as well.

        Called when the trainer is about to change its own.

        Returns:
            Whether they were freed.
        """
        return False

    def copy_weights(self, weights: Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
        """Copy the trainer's weights to main memory, for a later ``load_weights``; a collective.

        Args:
            weights: see ``load_weights``.
        """
        return [(name, x.detach().to("cpu", copy=True)) for name, x in weights]

    @abstractmethod
    def generate(
        self, prompts: Sequence[Prompt], config: SamplingConfig, on_progress: Progress | None = None
    ) -> list[list[Completion]]:
        """Sample ``config.n`` completions for each prompt, in the order of the prompts.

        Sample j of a prompt has its own generator with seed ``prompt.seed`` + j, so its random
        numbers do not depend on other prompts or earlier calls. On a CPU, neither do its tokens. On
        a GPU, kernels round differently at another batch size, and one different token changes all
        later ones: equal seeds give equal tokens only in a batch-invariant engine
        (``VLLMSampler.batch_invariant``). The distribution is the same in any case. The
        log-probabilities returned are those of the distribution that was sampled from, and
        at temperature 0 those of temperature 1.

        Args:
            prompts: to complete; there may be none.
            config: of the sampling.
            on_progress: called in this process during sampling, from any thread. Groups that it
                gets are kept if the sampling is interrupted.
        """

    @abstractmethod
    def stop(self) -> None:
        """Free the engine's memory; ``start`` may be called again.

        Also called after a failed ``start``. If ``is_concurrent``, it may be called while
        ``generate`` runs in another thread, and ends that call.
        """


def local_rank() -> int:
    """Return this process's rank among the trainer's on its machine, for any launcher."""
    if not distributed.is_initialized():
        return 0
    return distributed.get_node_local_rank(int(os.environ.get("SLURM_LOCALID", 0)))
