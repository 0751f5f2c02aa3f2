"""VLLMServerSampler: a vLLM server that the user has started, on this machine or elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from queue import Empty, SimpleQueue
from uuid import uuid4

from torch import Tensor, distributed

from prl_lightning.distributed import from_first_rank, is_first_rank, own_group
from prl_lightning.sampling.base import Progress, Sampler, SamplingConfig
from prl_lightning.sampling.server_client import ServerClient, ServerError
from prl_lightning.sampling.server_facts import (
    ServerFacts,
    complaints,
    read_facts,
    served_name,
    wait_until_healthy,
)
from prl_lightning.sampling.server_requests import Streamed, request_body, stream_group
from prl_lightning.sampling.vllm import TIED_HEAD
from prl_lightning.sampling.weight_transfer import FolderTransfer, WeightTransfer
from prl_lightning.types import Completion, Prompt


class VLLMServerSampler(Sampler):
    """Sample with a vLLM server; docs/engines.md has the command that starts it.

    The server may have any parallelism and belongs to one run: every rank sends its own prompts,
    and rank 0 sends the weights. The precision is the server's.

    Args:
        url: of the server.
        transfer: how weights are sent; by default a ``FolderTransfer``.
        timeout: seconds in which the server must take new weights, and in which at least one token
            must arrive during sampling.
        start_timeout: seconds to wait for a server that is starting.
        concurrency: prompts that a rank sends at a time.

    Raises:
        ValueError: ``url`` is not one, or a number is out of range.
    """

    reads_files = True
    is_concurrent = True
    dtype = "float32"  # until the server has been asked

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        transfer: WeightTransfer | None = None,
        timeout: float = 600.0,
        start_timeout: float = 300.0,
        concurrency: int = 256,
    ) -> None:
        self.url = url
        self.transfer = FolderTransfer() if transfer is None else transfer
        self.timeout = timeout
        self.start_timeout = start_timeout
        self.concurrency = concurrency
        for name in ("timeout", "concurrency"):
            if not getattr(self, name) > 0:
                value = getattr(self, name)
                raise ValueError(f"VLLMServerSampler.{name}={value}: must be above 0.")
        self._client = ServerClient(url, timeout)
        self._facts: ServerFacts | None = None
        self._model = ""
        self._version = ""
        self._group: distributed.ProcessGroup | None = None  # may be used in a thread

    @property
    def loads_in_thread(self) -> bool:  # type: ignore[override]
        """See ``Sampler``."""
        return self.transfer.sends_in_thread

    def identity(self) -> str:
        """See ``Sampler.identity``; the server may have a quantization."""
        quantization = self._facts and self._facts.config["model_config"]["quantization"]
        return f"{super().identity()} {quantization}"

    def missing_requirements(self) -> list[str]:
        """See ``Sampler.missing_requirements``: a healthy server with the right settings."""
        try:
            wait_until_healthy(self._client, self.start_timeout)
            self._facts = read_facts(self._client)
        except ServerError as error:
            return [str(error)]
        self.dtype = self._facts.dtype
        return [*complaints(self._facts), *self.transfer.complaints(self._facts)]

    def refuse_model(self, model: str, max_model_tokens: int) -> None:
        """See ``Sampler.refuse_model``; `prl check` asks no server."""
        if self._facts is not None:
            self._model = served_name(self._facts, model, max_model_tokens)

    def start(self, model: str, max_model_tokens: int) -> None:
        """See ``Sampler.start``.

        Raises:
            ValueError: see ``missing_requirements`` and ``refuse_model``.
        """
        if missing := self.missing_requirements():
            raise ValueError(" ".join(missing))
        self.refuse_model(model, max_model_tokens)
        self._group = own_group()

    def copy_weights(self, weights: Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
        """See ``Sampler.copy_weights``: only rank 0 keeps a copy, as it sends the weights."""
        if is_first_rank():
            return super().copy_weights(weights)
        for _ in weights:
            pass
        return []

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """See ``Sampler.load_weights``; a collective.

        Raises:
            RuntimeError: the server does not take them, on every rank.
        """
        own = self._without_tied_head(weights)
        version, failure = f"prl-{uuid4().hex}", None
        if self._group is not None:
            # A rank may still sample with the old weights, and has prompts that it has not sent.
            distributed.barrier(self._group)
        if is_first_rank():
            try:
                self._hand_over(own, version)
            except Exception as error:
                failure = error
        for _ in own:  # on the other ranks, and after an error on the first
            pass
        # The others do not sample before the server has the weights.
        self._version, message = from_first_rank(
            (version, failure and (str(failure) or repr(failure))), self._group
        )
        if message:
            raise ServerError(message) from failure

    def generate(
        self, prompts: Sequence[Prompt], config: SamplingConfig, on_progress: Progress | None = None
    ) -> list[list[Completion]]:
        """See ``Sampler.generate``."""
        self._check_version()
        self._client.allow_streams()
        copies = config.n // config.num_distinct
        groups: dict[int, list[Completion]] = {}
        pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix="prl-server")
        events: SimpleQueue[Streamed | Exception] = SimpleQueue()
        try:
            for row, prompt in enumerate(prompts):
                body = request_body(self._model, prompt, config)
                pool.submit(stream_group, self._client, row, body, events)
            while len(groups) < len(prompts):
                finished, tokens = self._next(events)
                new = {row: group * copies for row, group in finished.items()}
                groups |= new
                if on_progress is not None:
                    on_progress(new, tokens)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            self._client.cancel()
        self._check_version()
        return [groups[row] for row in range(len(prompts))]

    def stop(self) -> None:
        """See ``Sampler.stop``; the server itself continues."""
        self._client.cancel()
        if is_first_rank():
            with suppress(ServerError):
                self.transfer.close(self._client)

    def _hand_over(self, weights: Iterable[tuple[str, Tensor]], version: str) -> None:
        """Send weights between requests of anyone, and name them."""
        client = self._client
        client.post("/pause?mode=wait")
        try:
            self.transfer.send(client, weights)
            # Cached keys and values belong to the old weights.
            if not client.post("/reset_prefix_cache")["success"]:
                raise ServerError(
                    f"VLLMServerSampler.url={self.url}: the server did not reset its prefix cache, "
                    "which belongs to the old weights. Start it with --no-enable-prefix-caching."
                )
            client.post("/update_weight_version", {"new_version": version})
        finally:
            with suppress(ServerError):  # of a server that has ended, which is said already
                client.post("/resume")

    def _without_tied_head(
        self, weights: Iterable[tuple[str, Tensor]]
    ) -> Iterator[tuple[str, Tensor]]:
        has_head = self._started().has_head
        return (item for item in weights if has_head or item[0] != TIED_HEAD)

    def _check_version(self) -> None:
        """Notice a server that was restarted, or has another run's weights.

        Raises:
            ServerError: its weights are not those of the last ``load_weights``.
        """
        found = self._client.get("/weight_info")["weight_version"]
        if found != self._version:
            raise ServerError(
                f"VLLMServerSampler.url={self.url}: the server has weight_version={found!r}, but "
                f"this run has sent {self._version!r}. It was restarted, or another run uses it: "
                "start one server for each run."
            )

    def _next(
        self, events: SimpleQueue[Streamed | Exception]
    ) -> tuple[dict[int, list[Completion]], int]:
        """Wait for tokens; return the finished groups by row, and the number of tokens."""
        finished: dict[int, list[Completion]] = {}
        tokens = 0
        try:
            event = events.get(timeout=self.timeout)
            while True:
                if isinstance(event, Exception):
                    raise event
                tokens += event.tokens
                if event.group is not None:
                    finished[event.row] = event.group
                event = events.get_nowait()
        except Empty:
            if not finished and not tokens:
                raise ServerError(
                    f"VLLMServerSampler.url={self.url}: no token arrived within timeout="
                    f"{self.timeout:g} seconds. See the server's log, or raise "
                    "rollout.sampler.timeout."
                ) from None
        return finished, tokens

    def _started(self) -> ServerFacts:
        if self._facts is None:
            raise RuntimeError("VLLMServerSampler is not started: call start() first.")
        return self._facts
