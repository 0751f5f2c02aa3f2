"""The requests of VLLMServerSampler for completions, and the answers piece by piece."""

from __future__ import annotations

from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

from prl_lightning.sampling.base import SamplingConfig
from prl_lightning.sampling.server_client import ServerClient, ServerError
from prl_lightning.types import Completion, Prompt

PATH = "/v1/completions"
STREAM_INTERVAL = 16  # tokens of a piece: few enough to see progress, many enough to parse fast
# A server applies what a model's generation config recommends, unless a request says otherwise.
NEUTRAL = {
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


@dataclass(frozen=True)
class Streamed:
    """A piece of an answer.

    Attributes:
        row: index of the prompt.
        tokens: number of new tokens.
        group: the completions, in the last piece.
    """

    row: int
    tokens: int = 0
    group: list[Completion] | None = None


@dataclass
class _Sample:
    """A completion that is being sampled."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None

    def completion(self) -> Completion:
        if self.finish_reason not in ("stop", "length"):
            raise ServerError(
                f"the vLLM server ended a completion with finish_reason={self.finish_reason!r} "
                f"after {len(self.token_ids)} tokens. Its log says why."
            )
        return Completion(self.token_ids, self.logprobs, finished=self.finish_reason == "stop")


def request_body(model: str, prompt: Prompt, config: SamplingConfig) -> dict[str, Any]:
    """Return the request for the completions of one prompt.

    Requests have one seed each, and a prompt's own, so they have one prompt each.

    Args:
        model: as it is served.
        prompt: to complete.
        config: of the sampling.
    """
    return NEUTRAL | {
        "model": model,
        "prompt": prompt.token_ids,
        "n": config.num_distinct,
        "seed": prompt.seed,  # vLLM adds j for sample j
        "temperature": config.temperature,
        "top_p": config.top_p,
        "max_tokens": config.max_new_tokens,
        "stop_token_ids": list(config.stop_token_ids),
        # Stop at the stop tokens only, not at the model's own end-of-sequence token.
        "ignore_eos": True,
        "stop": list(config.stop_texts),
        "skip_special_tokens": False,
        "logprobs": 0,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "stream": True,
        "stream_interval": STREAM_INTERVAL,
    }


def stream_group(
    client: ServerClient,
    row: int,
    body: dict[str, Any],
    events: SimpleQueue[Streamed | Exception],
) -> None:
    """Sample the completions of one prompt; runs in a thread.

    Args:
        client: of the server.
        row: index of the prompt.
        body: see ``request_body``.
        events: gets the pieces, or the exception.
    """
    samples = [_Sample() for _ in range(body["n"])]
    try:
        for answer in client.stream(PATH, body):
            for choice in answer["choices"]:
                sample = samples[choice["index"]]
                sample.token_ids += choice["token_ids"]
                sample.logprobs += choice["logprobs"]["token_logprobs"]
                sample.finish_reason = choice["finish_reason"]
                events.put(Streamed(row, len(choice["token_ids"])))
        events.put(Streamed(row, group=[sample.completion() for sample in samples]))
    except Exception as error:
        events.put(error)
