"""A server with the endpoints of vLLM's, from the standard library; it can be made to fail."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

import torch
from transformers import AutoConfig

WEIGHTS = [("model.norm.weight", torch.ones(3)), ("lm_head.weight", torch.ones(2, 3))]

Answer = Callable[["Handler", Any], None]


class FakeVLLM(ThreadingHTTPServer):
    """Completions are two tokens each: the seed and the index of the sample.

    Attributes:
        calls: path and body of each request, in their order.
        answers: by path, what is done instead of an ordinary answer.
    """

    daemon_threads = True

    def __init__(self, model: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        size = AutoConfig.from_pretrained(model).vocab_size
        self.models = [{"id": model, "root": model, "max_model_len": 64}]
        self.config: dict[str, dict[str, Any]] = {
            "model_config": {
                "dtype": "torch.float32",
                "logprobs_mode": "processed_logprobs",
                "quantization": None,
            },
            "device_config": {"device": "cpu"},
            "scheduler_config": {"enable_chunked_prefill": False},
            "load_config": {"load_format": "auto"},
            "weight_transfer_config": {"backend": "nccl"},
        }
        self.model_text = f"(embed): Embedding(org_vocab_size={size})\n(lm_head): Head()"
        self.version = "0.32.0"
        self.weight_version = "default"
        self.is_paused = False
        self.calls: list[tuple[str, Any]] = []
        self.headers: list[Any] = []
        self.answers: dict[str, Answer] = {}

    def paths(self) -> list[str]:
        return [path for path, _ in self.calls]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone away is part of the tests."""

    def value(self, path: str, body: Any) -> Any:
        """The ordinary JSON answer of a path."""
        if path in ("/pause", "/resume"):
            self.is_paused = path == "/pause"
        if path == "/update_weight_version":
            self.weight_version = body["new_version"]
        values: dict[str, Any] = {
            "/version": {"version": self.version},
            "/v1/models": {"data": self.models},
            "/server_info": {"vllm_config": self.config},
            "/collective_rpc": {"results": [self.model_text]},
            "/reset_prefix_cache": {"success": True},
            "/weight_info": {"weight_version": self.weight_version},
            "/get_world_size": {"world_size": 2},
        }
        return values.get(path)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeVLLM

    def do_GET(self) -> None:
        self.do_POST()

    def do_POST(self) -> None:
        path = urlsplit(self.path).path
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "null")
        self.server.calls.append((self.path, body))
        self.server.headers.append(self.headers)
        if path in self.server.answers:
            self.server.answers[path](self, body)
        elif path == "/v1/completions":
            self.complete(body)
        else:
            self.give(200, self.server.value(path, body))

    def give(self, status: int, value: Any) -> None:
        text = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def complete(self, body: Any, finish_reason: str = "stop") -> None:
        assert not self.server.is_paused
        self.begin()
        for index in range(body["n"]):
            self.piece(index, [body["seed"]], None)
        for index in range(body["n"]):
            self.piece(index, [index], finish_reason)
        self.event("[DONE]")
        self.chunk(b"")

    def begin(self) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def piece(self, index: int, tokens: list[int], finish_reason: str | None) -> None:
        choice = {
            "index": index,
            "token_ids": tokens,
            "logprobs": {"token_logprobs": [-0.5] * len(tokens)},
            "finish_reason": finish_reason,
        }
        self.event(json.dumps({"choices": [choice]}))

    def event(self, data: str) -> None:
        self.chunk(f"data: {data}\n\n".encode())

    def chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def log_message(self, format: str, *args: Any) -> None:
        """Not to the terminal."""


def refuse(status: int, message: str) -> Answer:
    return lambda handler, body: handler.give(status, {"error": {"message": message}})


def die(handler: Handler, body: Any) -> None:
    """Close the connection in the middle of an answer."""
    handler.begin()
    handler.piece(0, [5], None)
    handler.close_connection = True


def wait_for_the_client(handler: Handler, body: Any) -> None:
    handler.rfile.read(1)  # until it closes the connection


@contextmanager
def fake_vllm(model: str) -> Iterator[FakeVLLM]:
    with FakeVLLM(model) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()
