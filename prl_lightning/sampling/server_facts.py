"""What a vLLM server says about itself, and what VLLMServerSampler requires of it."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from packaging.specifiers import SpecifierSet

from prl_lightning.models.loading import load_config
from prl_lightning.sampling.server_client import ServerClient, ServerError
from prl_lightning.sampling.vllm_requirements import SUPPORTED

POLL_SECONDS = 1.0


@dataclass(frozen=True)
class ServerFacts:
    """A vLLM server's settings.

    Attributes:
        models: the served models, with ``id``, ``root`` and ``max_model_len``.
        config: its ``VllmConfig`` as JSON.
        model_text: the engine's model, printed by torch.
    """

    models: list[dict[str, Any]]
    config: dict[str, Any]
    model_text: str

    @property
    def dtype(self) -> str:
        """Precision of the engine, such as "float32"."""
        return str(self.config["model_config"]["dtype"]).removeprefix("torch.")

    @property
    def has_head(self) -> bool:
        """Whether the model has an output head; if tied, it may use the embeddings alone."""
        return "(lm_head)" in self.model_text

    @property
    def vocab_size(self) -> int | None:
        """Number of tokens of the embedding; None if the text does not say."""
        found = re.search(r"org_vocab_size=(\d+)", self.model_text)
        return int(found[1]) if found else None


def wait_until_healthy(client: ServerClient, seconds: float) -> None:
    """Wait for a server that is starting.

    Args:
        client: of the server.
        seconds: to wait at most.

    Raises:
        ServerError: it is still not healthy.
    """
    end = time.monotonic() + seconds
    has_told = False
    while True:
        try:
            client.get("/health", attempts=1)
            return
        except ServerError as error:
            if time.monotonic() >= end:
                raise ServerError(f"After start_timeout={seconds:g} seconds: {error}") from error
        if not has_told:
            rank_zero_info(f"Waiting up to {seconds:g} seconds for the vLLM server {client.url}.")
            has_told = True
        time.sleep(POLL_SECONDS)


def read_facts(client: ServerClient) -> ServerFacts:
    """Ask a healthy server for its settings.

    Raises:
        ServerError: it does not answer, has another version, or no endpoints for weights.
    """
    version = client.get("/version")["version"]
    if not SpecifierSet(SUPPORTED).contains(version, prereleases=True):
        raise ServerError(
            f"VLLMServerSampler.url={client.url}: the server has vllm {version}, but vllm"
            f"{SUPPORTED} is supported. Start it with such a version."
        )
    models = client.get("/v1/models")["data"]
    try:
        config = client.get("/server_info?config_format=json")["vllm_config"]
    except ServerError as error:
        if error.status != 404:
            raise
        raise ServerError(
            f"VLLMServerSampler.url={client.url}: the server has no endpoints for new weights. "
            "Start it with the environment variable VLLM_SERVER_DEV_MODE=1."
        ) from error
    texts = client.post("/collective_rpc", {"method": "get_model_inspection"})["results"]
    return ServerFacts(models, config, "\n".join(texts))


def complaints(facts: ServerFacts) -> Iterator[str]:
    """Yield the settings with which it would sample something else than asked, with the fix."""
    mode = facts.config["model_config"]["logprobs_mode"]
    if mode != "processed_logprobs":
        yield (
            f"The vLLM server has logprobs_mode={mode}, but the log-probabilities must be those "
            "of the sampled distribution. Start it with --logprobs-mode processed_logprobs."
        )
    if facts.config["device_config"]["device"] != "cpu":
        return
    if facts.config["scheduler_config"]["enable_chunked_prefill"]:
        yield (
            "The vLLM server has enable_chunked_prefill=true, with which the CPU build cannot "
            "sample with seeds. Start it with --no-enable-chunked-prefill."
        )
    if "MoE" in facts.model_text:
        yield (
            "The vLLM server has a mixture of experts without a GPU, where it ignores new weights "
            "of the experts. Use prl_lightning.sampling.VLLMSampler."
        )


def served_name(facts: ServerFacts, model: str, max_model_tokens: int) -> str:
    """Return the name under which the server has a model.

    Args:
        facts: of the server.
        model: the policy's Hugging Face id or folder.
        max_model_tokens: longest row.

    Raises:
        ValueError: it serves another model or vocabulary, or only shorter rows.
    """
    matching = [one for one in facts.models if model in (one["id"], one.get("root"))]
    if not matching:
        others = ", ".join(repr(one["id"]) for one in facts.models)
        raise ValueError(
            f"model.policy={model!r}, but the vLLM server serves {others}. Start it with --model "
            f"{model}, or with --served-model-name {model} if its folder has another name there."
        )
    limit = matching[0]["max_model_len"]
    if limit < max_model_tokens:
        raise ValueError(
            f"The vLLM server has max_model_len={limit}, but a prompt with its completion may have "
            f"{max_model_tokens} tokens. Start it with --max-model-len {max_model_tokens}, or "
            "lower data.max_prompt_tokens or rollout.max_new_tokens."
        )
    size = load_config(model).get_text_config().vocab_size
    if facts.vocab_size not in (None, size):
        raise ValueError(
            f"model.policy={model!r} has a vocabulary of {size} tokens, but the vLLM server's "
            f"model has {facts.vocab_size}. Start it with the same model."
        )
    return str(matching[0]["id"])
