"""Sampling with ``transformers`` generate: for a machine, or an architecture, without vLLM."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    PreTrainedModel,
)

from prl_lightning.models.packed_attention import disable_cudnn_attention
from prl_lightning.sampling.base import Progress, Sampler, SamplingConfig
from prl_lightning.types import Completion, Prompt


class HFSampler(Sampler):
    """Sample with ``model.generate`` from a copy of the policy.

    A copy, because a policy that a strategy has sharded cannot generate; it costs the policy's
    memory once more.

    Args:
        batch_size: rows generated together; lower it where memory is short.
        dtype: precision of the copy; by default float32, and on a GPU the trainer's.
    """

    def __init__(self, batch_size: int = 128, dtype: str | None = None) -> None:
        self.batch_size = batch_size
        self.dtype = dtype or "float32"
        self.follows_trainer = dtype is None
        self._model: PreTrainedModel | None = None

    def start(self, model: str, max_model_tokens: int) -> None:
        """See ``Sampler.start``."""
        disable_cudnn_attention()  # each step has a new length
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
        self._model = AutoModelForCausalLM.from_config(config, dtype=self.dtype).eval()
        # The model's own defaults (a top-k, a repetition penalty) would bend the distribution.
        self._model.generation_config = GenerationConfig()

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """See ``Sampler.load_weights``.

        Raises:
            RuntimeError: the names sent are not those of the model's weights.
        """
        model = self._started()
        own = model.state_dict()
        missing = set(own)
        with torch.no_grad():
            for name, tensor in weights:
                if name not in own:
                    raise RuntimeError(f"{name!r} was sent, but the model has no such weight")
                if own[name].device != tensor.device:
                    own = model.to(tensor.device).state_dict()
                own[name].copy_(tensor)
                missing.discard(name)
        if missing:
            raise RuntimeError(f"weights never sent to the sampler: {sorted(missing)}")

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Prompt], config: SamplingConfig, on_progress: Progress | None = None
    ) -> list[list[Completion]]:
        """See ``Sampler.generate``."""
        rows = [(row, sample) for row in range(len(prompts)) for sample in range(config.n)]
        groups: list[list[Completion]] = [[] for _ in prompts]
        for start in range(0, len(rows), self.batch_size):
            chunk = rows[start : start + self.batch_size]
            seeds = [prompts[row].seed + sample for row, sample in chunk]
            token_ids = [prompts[row].token_ids for row, _ in chunk]
            completions = self._generate(token_ids, seeds, config)
            for (row, _), completion in zip(chunk, completions, strict=True):
                groups[row].append(completion)
            if on_progress is not None:
                done = sum(sample == config.n - 1 for _, sample in chunk)
                on_progress(done, sum(len(one.token_ids) for one in completions))
        return groups

    def stop(self) -> None:
        """See ``Sampler.stop``."""
        self._model = None

    def _started(self) -> PreTrainedModel:
        if self._model is None:
            raise RuntimeError("the sampler is not started: call start() first")
        return self._model

    def _generate(
        self, prompts: list[list[int]], seeds: list[int], config: SamplingConfig
    ) -> list[Completion]:
        model = self._started()
        width = max(map(len, prompts))
        pad, stop = config.stop_token_ids[0], set(config.stop_token_ids)
        padded = [[pad] * (width - len(ids)) + ids for ids in prompts]
        mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]
        draw = _SeededDraw(seeds, config, prompt_width=width)
        output = model.generate(
            torch.tensor(padded, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            logits_processor=[draw],
            generation_config=GenerationConfig(
                do_sample=False,
                max_new_tokens=config.max_new_tokens,
                eos_token_id=list(config.stop_token_ids),
                pad_token_id=pad,
            ),
        )
        sampled = output[:, width:].tolist()
        logprobs = torch.stack(draw.logprobs, dim=1)[:, : output.shape[1] - width].tolist()
        return [_cut(ids, row, stop) for ids, row in zip(sampled, logprobs, strict=True)]


class _SeededDraw(LogitsProcessor):
    """Draw each row's token from that row's own random numbers, and note its log-probability.

    ``generate`` samples all rows from one generator, so a completion would depend on its
    neighbours. Here the token is drawn by inverting the cumulative distribution and every other
    one is ruled out, so that greedy decoding picks it.
    """

    def __init__(self, seeds: list[int], config: SamplingConfig, prompt_width: int) -> None:
        self.config = config
        self.prompt_width = prompt_width
        self.uniforms = torch.stack(
            [
                torch.rand(config.max_new_tokens, generator=torch.Generator().manual_seed(seed))
                for seed in seeds
            ]
        )
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logprobs = (scores.float() / self.config.temperature).log_softmax(-1)
        if self.config.top_p < 1.0:
            logprobs = _nucleus(logprobs, self.config.top_p)
        cumulative = logprobs.double().exp().cumsum(-1)
        uniform = self.uniforms[:, input_ids.shape[1] - self.prompt_width, None]
        # Scaled by the last entry, which rounding keeps from being exactly 1.
        target = uniform.to(cumulative) * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, target, right=True)
        token = token.clamp(max=scores.shape[-1] - 1)
        self.logprobs.append(logprobs.gather(-1, token).squeeze(-1))
        return torch.full_like(scores, -torch.inf).scatter(-1, token, 0.0)


def _nucleus(logprobs: Tensor, top_p: float) -> Tensor:
    """Keep the smallest set of tokens with mass ``top_p``, renormalised; (B, V) to (B, V)."""
    ordered, order = logprobs.sort(dim=-1, descending=True)
    before = ordered.exp().cumsum(-1) - ordered.exp()
    dropped = (before >= top_p).scatter(-1, order, before >= top_p)
    return logprobs.masked_fill(dropped, -torch.inf).log_softmax(-1)


def _cut(token_ids: list[int], logprobs: list[float], stop: set[int]) -> Completion:
    """End a padded row after its first stop token."""
    end = next((i + 1 for i, token in enumerate(token_ids) if token in stop), None)
    return Completion(token_ids[:end], logprobs[:end], finished=end is not None)
