"""ServerClient: JSON and event streams of a vLLM server over HTTP.

It uses the standard library. No HTTP package comes with every supported version of the
dependencies, and ``urllib`` would send prompts through a proxy that the environment names.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from threading import Lock
from typing import Any
from urllib.parse import urlsplit

CONNECT_SECONDS = 10.0
CONNECT_ATTEMPTS = 3  # nothing has been sent yet, so that only connecting is ever tried again
RETRY_SECONDS = 1.0
ERROR_CHARACTERS = 600  # of an answer, in a message


class ServerError(RuntimeError):
    """The server cannot be reached, refuses a request, ends, or answers late.

    Attributes:
        status: of its answer; None if there was none.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class ServerClient:
    """Requests to one server, from any thread.

    Args:
        url: such as http://127.0.0.1:8000.
        timeout: seconds to wait for an answer that is not streamed.

    Raises:
        ValueError: ``url`` has another form.
    """

    def __init__(self, url: str, timeout: float) -> None:
        parts = urlsplit(url)
        try:
            host, port = parts.hostname, parts.port
        except ValueError:  # the port is not a number
            host, port = None, None
        if parts.scheme not in ("http", "https") or not host:
            raise ValueError(f"VLLMServerSampler.url={url!r}: write it as http://127.0.0.1:8000.")
        self.url = url.rstrip("/")
        self.timeout = timeout
        self._kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        self._address = (host, port)
        self._path = parts.path.rstrip("/")
        self._lock = Lock()
        self._streams: set[socket.socket] = set()
        self._is_cancelled = False

    def get(self, path: str, attempts: int = CONNECT_ATTEMPTS) -> Any:
        """Return the JSON value of a path.

        Args:
            path: with its query.
            attempts: to connect.

        Raises:
            ServerError: see the class.
        """
        return self._request("GET", path, None, attempts)

    def post(self, path: str, body: Any = None) -> Any:
        """Send a JSON value to a path, and return the answer's.

        Raises:
            ServerError: see the class.
        """
        return self._request("POST", path, body, CONNECT_ATTEMPTS)

    def stream(self, path: str, body: Any) -> Iterator[Any]:
        """Send a JSON value to a path, and yield the values of the answer's server-sent events.

        There is no limit of time: a request waits in the server's queue without a sign of it.

        Raises:
            ServerError: see the class; also after ``cancel``.
        """
        with self._open("POST", path, body, CONNECT_ATTEMPTS, None) as response:
            for line in response:
                field, _, data = line.strip().partition(b": ")
                if field != b"data":
                    continue
                if data == b"[DONE]":
                    return
                event = json.loads(data)
                if "error" in event:
                    raise ServerError(self._refusal(path, "failed", data.decode()))
                yield event
        raise ServerError(self._closed(path, "the answer is not complete"))

    def cancel(self) -> None:
        """End all streams, from any thread; the server aborts their requests."""
        with self._lock:
            self._is_cancelled = True
            for stream in self._streams:
                with suppress(OSError):  # it has just ended
                    stream.shutdown(socket.SHUT_RDWR)

    def allow_streams(self) -> None:
        """Take streams again after ``cancel``."""
        with self._lock:
            self._is_cancelled = False

    def _request(self, method: str, path: str, body: Any, attempts: int) -> Any:
        with self._open(method, path, body, attempts, self.timeout) as response:
            text = response.read()
        try:
            return json.loads(text or "null")
        except ValueError as error:
            found = text.decode(errors="replace")[:ERROR_CHARACTERS]
            raise ServerError(
                f"VLLMServerSampler.url={self.url}: {path} answered {found!r}, which is not JSON. "
                "Is this a vLLM server?"
            ) from error

    @contextmanager
    def _open(
        self, method: str, path: str, body: Any, attempts: int, timeout: float | None
    ) -> Iterator[HTTPResponse]:
        """Send a request and yield the answer, whose status is 200."""
        connection = self._connect(attempts)
        own = connection.sock
        try:
            if timeout is None:
                self._register(own)
            own.settimeout(timeout)
            text = None if body is None else json.dumps(body)
            connection.request(method, self._path + path, text, _headers())
            response = connection.getresponse()
            if response.status != 200:
                detail = response.read().decode(errors="replace")
                answered = f"answered {response.status}"
                raise ServerError(self._refusal(path, answered, detail), response.status)
            yield response
        except TimeoutError as error:
            raise ServerError(
                f"VLLMServerSampler.url={self.url}: {path} was not answered within timeout="
                f"{timeout:g} seconds. See the server's log, or raise rollout.sampler.timeout."
            ) from error
        except (OSError, HTTPException) as error:
            raise ServerError(self._closed(path, f"{type(error).__name__}: {error}")) from error
        finally:
            with self._lock:
                self._streams.discard(own)
            connection.close()

    def _connect(self, attempts: int) -> HTTPConnection:
        for attempt in range(attempts):
            connection = self._kind(*self._address, timeout=CONNECT_SECONDS)
            try:
                connection.connect()
                return connection
            except OSError as error:
                reason = error
            if attempt < attempts - 1:
                time.sleep(RETRY_SECONDS)
        raise ServerError(
            f"VLLMServerSampler.url={self.url}: no server answers there ({reason}). Start it as "
            "docs/engines.md says, or correct rollout.sampler.url."
        ) from reason

    def _register(self, stream: socket.socket) -> None:
        with self._lock:
            if self._is_cancelled:
                raise ServerError("the sampling was cancelled.")
            self._streams.add(stream)

    def _refusal(self, path: str, what: str, detail: str) -> str:
        with suppress(ValueError, KeyError, TypeError):  # vLLM's form of an error
            detail = json.loads(detail)["error"]["message"]
        return (
            f"VLLMServerSampler.url={self.url}: {path} {what}: "
            f"{detail[:ERROR_CHARACTERS].rstrip('.')}. The server's log has more."
        )

    def _closed(self, path: str, reason: str) -> str:
        return (
            f"VLLMServerSampler.url={self.url}: the server closed the connection of {path} "
            f"({reason}). It has ended or was restarted; its log says why."
        )


def _headers() -> dict[str, str]:
    headers = {"Content-Type": "application/json", "Connection": "close"}
    # The variable from which the server reads it, too; a configuration would be written to files.
    if key := os.environ.get("VLLM_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    return headers
