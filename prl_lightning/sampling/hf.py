"""HFSampler: sampling with transformers' ``generate``, where vLLM does not run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    PreTrainedModel,
    StoppingCriteria,
    TopPLogitsWarper,
)

from prl_lightning.models.loading import causal_lm_from_config, load_tokenizer
from prl_lightning.models.packed_attention import (
    disable_cudnn_attention,
    use_exact_attention,
)
from prl_lightning.sampling.base import Progress, Sampler, SamplingConfig
from prl_lightning.types import Completion, Prompt


class HFSampler(Sampler):
    """Sample with ``model.generate`` from a copy of the policy.

    The copy takes the policy's memory a second time. A policy that a strategy has sharded cannot
    generate itself.

    Args:
        batch_size: completions generated at a time; lower it if memory is short.
        dtype: precision of the copy; by default float32, or on a GPU the trainer's half precision.
    """

    def __init__(self, batch_size: int = 128, dtype: str | None = None) -> None:
        self.batch_size = batch_size
        self.dtype = dtype or "float32"
        self.follows_trainer = dtype is None
        self._model: PreTrainedModel | None = None

    def start(self, model: str, max_model_tokens: int) -> None:
        """See ``Sampler.start``."""
        disable_cudnn_attention()  # each decoding step has a new length
        self._name = model
        self._model = causal_lm_from_config(model, self.dtype)
        use_exact_attention(self._model)
        # Drop the model's recommended settings, such as top-k: they would change the distribution.
        self._model.generation_config = GenerationConfig()

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """See ``Sampler.load_weights``.

        Raises:
            RuntimeError: the names of the weights are not those of the model.
        """
        model = self._started()
        own = model.state_dict()
        missing = set(own)
        for name, tensor in weights:
            if name not in own:
                raise RuntimeError(f"weight {name!r} was sent, but the sampler's model has none.")
            if own[name].device != tensor.device:
                own = model.to(tensor.device).state_dict()
            own[name].copy_(tensor)
            missing.discard(name)
        if missing:
            raise RuntimeError(f"weights {sorted(missing)} were never sent to the sampler.")

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Prompt], config: SamplingConfig, on_progress: Progress | None = None
    ) -> list[list[Completion]]:
        """See ``Sampler.generate``."""
        size = config.num_distinct
        rows = [(p.token_ids, p.seed + sample) for p in prompts for sample in range(size)]
        done: list[Completion] = []

        def group_of(row: int) -> list[Completion]:
            return done[row * size : (row + 1) * size] * (config.n // size)

        for start in range(0, len(rows), self.batch_size):
            done += self._generate(rows[start : start + self.batch_size], config, on_progress)
            if on_progress is not None:
                whole = range(start // size, len(done) // size)
                on_progress({row: group_of(row) for row in whole}, 0)
        return [group_of(row) for row in range(len(prompts))]

    def stop(self) -> None:
        """See ``Sampler.stop``."""
        self._model = None

    def _started(self) -> PreTrainedModel:
        if self._model is None:
            raise RuntimeError("HFSampler is not started: call start() first.")
        return self._model

    def _generate(
        self,
        rows: list[tuple[list[int], int]],
        config: SamplingConfig,
        on_progress: Progress | None,
    ) -> list[Completion]:
        """Complete rows of prompt and seed."""
        model, pad = self._started(), next(iter(config.stop_token_ids), 0)
        prompts = [torch.tensor(token_ids) for token_ids, _ in rows]
        padded = pad_sequence(prompts, True, pad, padding_side="left")
        mask = pad_sequence([torch.ones_like(x) for x in prompts], True, padding_side="left")
        width = padded.shape[1]
        seeds = [seed for _, seed in rows]
        processor = _SeededSampling(seeds, config, width, on_progress)
        ends = _StopTexts(self._name, config, width) if config.stop_texts else None
        output = model.generate(
            padded.to(model.device),
            attention_mask=mask.to(model.device),
            logits_processor=[processor],
            stopping_criteria=[ends] if ends else None,
            generation_config=GenerationConfig(
                do_sample=False,
                max_new_tokens=config.max_new_tokens,
                eos_token_id=list(config.stop_token_ids) or None,
                pad_token_id=pad,
            ),
        )
        sampled = output[:, width:].tolist()
        logprobs = torch.stack(processor.logprobs, 1)[:, : output.shape[1] - width].tolist()
        text_ends = ends.of_row if ends else {}
        return [
            _cut(*pair, config.stop_token_ids, text_ends.get(row))
            for row, pair in enumerate(zip(sampled, logprobs, strict=True))
        ]


class _SeededSampling(LogitsProcessor):
    """Sample each row's token with the row's own random numbers, and keep its log-probability.

    ``generate`` has one generator for all rows, so a completion would depend on the other rows.
    This samples by inverting the cumulative distribution and then masks every other token, so that
    greedy decoding picks the sampled one.
    """

    def __init__(
        self,
        seeds: list[int],
        config: SamplingConfig,
        prompt_width: int,
        on_progress: Progress | None,
    ) -> None:
        self.config = config
        self.prompt_width = prompt_width
        self.on_progress = on_progress
        self.is_unfinished = torch.ones(len(seeds), dtype=torch.bool)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.uniforms = torch.stack(
            [torch.rand(config.max_new_tokens, generator=generator) for generator in generators]
        )
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logprobs = (scores.float() / self.config.logprob_temperature).log_softmax(-1)
        if not self.config.temperature:
            return self._keep(logprobs.argmax(-1, keepdim=True), logprobs)
        if self.config.top_p < 1.0:
            nucleus = TopPLogitsWarper(self.config.top_p)
            logprobs = nucleus(input_ids, logprobs).log_softmax(-1)
        cumulative = logprobs.double().exp().cumsum(-1)
        uniform = self.uniforms[:, input_ids.shape[1] - self.prompt_width, None]
        # Scale by the last entry, which is not exactly 1 because of rounding.
        target = uniform.to(cumulative) * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, target, right=True)
        return self._keep(token.clamp(max=scores.shape[-1] - 1), logprobs)

    def _keep(self, token: Tensor, logprobs: Tensor) -> Tensor:
        self.logprobs.append(logprobs.gather(-1, token).squeeze(-1))
        if self.on_progress is not None:
            self.on_progress({}, int(self.is_unfinished.sum()))
            stop = torch.tensor(self.config.stop_token_ids)
            self.is_unfinished &= ~torch.isin(token.squeeze(-1).cpu(), stop)
        return torch.full_like(logprobs, -torch.inf).scatter(-1, token, 0.0)


class _StopTexts(StoppingCriteria):
    """End a row with the token that completes a stop text; ``of_row`` has the rows' ends.

    transformers' ``stop_strings`` reads the prompt as well, and not every tokenizer.
    """

    def __init__(self, name: str, config: SamplingConfig, prompt_width: int) -> None:
        self.texts = config.stop_texts
        self.tokenizer = load_tokenizer(name)
        self.prompt_width = prompt_width
        # A token has at least a byte of text, and the first ones may be parts of a character.
        self.window = max(len(text.encode()) for text in self.texts) + 8
        self.of_row: dict[int, int] = {}

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        sampled = input_ids[:, self.prompt_width :]
        for row, text in enumerate(self.tokenizer.batch_decode(sampled[:, -self.window :])):
            if any(stop in text for stop in self.texts):
                self.of_row.setdefault(row, sampled.shape[1])
        is_done = [row in self.of_row for row in range(len(sampled))]
        return torch.tensor(is_done, device=input_ids.device)


def _cut(
    token_ids: list[int], logprobs: list[float], stop: tuple[int, ...], text_end: int | None
) -> Completion:
    """End a padded row after its first stop token or text."""
    ends = [i + 1 for i, token in enumerate(token_ids) if token in stop]
    end = min([*ends[:1], *([text_end] if text_end else [])], default=None)
    return Completion(token_ids[:end], logprobs[:end], finished=end is not None)
