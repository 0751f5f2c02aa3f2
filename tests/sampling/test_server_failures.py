"""A server that fails while it samples; it is a fake."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from threading import Event
from typing import Any

import pytest

from fake_vllm import Answer, FakeVLLM, Handler, die, refuse, wait_for_the_client
from prl_lightning.sampling import (
    SamplingConfig,
    VLLMServerSampler,
)
from prl_lightning.types import Completion, Prompt

CONFIG = SamplingConfig(n=2, temperature=1.0, max_new_tokens=8, stop_token_ids=(1,))
PROMPTS = [Prompt([5, 6], "", seed=10 * row) for row in range(3)]


def completions(group: list[Completion]) -> list[tuple[list[int], bool]]:
    return [(one.token_ids, one.finished) for one in group]


def test_pieces_become_groups_in_the_order_of_the_prompts(
    fake_server: FakeVLLM, server_sampler: VLLMServerSampler
) -> None:
    groups = server_sampler.generate(PROMPTS, CONFIG)
    assert [completions(group) for group in groups] == [
        [([prompt.seed, index], True) for index in range(2)] for prompt in PROMPTS
    ]
    assert groups[0][0].logprobs == [-0.5, -0.5]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (refuse(500, "EngineDeadError"), "/v1/completions answered 500: EngineDeadError"),
        (die, "closed the connection of /v1/completions"),
        (lambda handler, body: handler.complete(body, "abort"), "finish_reason='abort' after 2"),
    ],
    ids=["500", "dies", "aborts"],
)
def test_a_failure_while_sampling_keeps_the_finished_groups(
    fake_server: FakeVLLM, server_sampler: VLLMServerSampler, answer: Answer, message: str
) -> None:
    """The last prompt fails once the first is finished."""
    first_is_kept, kept = Event(), dict[int, list[Completion]]()

    def answer_some(handler: Handler, body: Any) -> None:
        if body["seed"] == PROMPTS[0].seed:
            handler.complete(body)
        elif body["seed"] == PROMPTS[2].seed:
            assert first_is_kept.wait(timeout=600)
            answer(handler, body)
        else:  # still running when the error comes
            handler.begin()
            handler.rfile.read(1)

    def keep(groups: Any, tokens: int) -> None:
        kept.update(groups)
        if groups:
            first_is_kept.set()

    fake_server.answers["/v1/completions"] = answer_some
    with pytest.raises(RuntimeError, match=message):
        server_sampler.generate(PROMPTS, CONFIG, keep)
    assert {row: completions(group) for row, group in kept.items()} == {
        0: [([0, 0], True), ([0, 1], True)]
    }
    del fake_server.answers["/v1/completions"]
    assert len(server_sampler.generate(PROMPTS, CONFIG)) == len(PROMPTS)  # the next call is whole


def test_an_error_in_the_stream(fake_server: FakeVLLM, server_sampler: VLLMServerSampler) -> None:
    def fail(handler: Handler, body: Any) -> None:
        handler.begin()
        handler.event('{"error": {"message": "out of memory"}}')

    fake_server.answers["/v1/completions"] = fail
    with pytest.raises(RuntimeError, match="/v1/completions failed: out of memory"):
        server_sampler.generate(PROMPTS, CONFIG)


def test_a_server_that_sends_no_token(
    fake_server: FakeVLLM, server_sampler: VLLMServerSampler
) -> None:
    server_sampler.timeout = 0.2
    fake_server.answers["/v1/completions"] = wait_for_the_client
    with pytest.raises(RuntimeError, match=r"no token arrived within timeout=0\.2 seconds"):
        server_sampler.generate(PROMPTS, CONFIG)


def test_stop_ends_a_call_in_another_thread(
    fake_server: FakeVLLM, server_sampler: VLLMServerSampler
) -> None:
    is_sampling = Event()

    def begin(handler: Handler, body: Any) -> None:
        is_sampling.set()
        wait_for_the_client(handler, body)

    fake_server.answers["/v1/completions"] = begin
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(server_sampler.generate, PROMPTS, CONFIG)
        assert is_sampling.wait(timeout=600)
        server_sampler.stop()
        assert isinstance(running.exception(timeout=600), RuntimeError)


def test_connecting_is_tried_again(
    fake_server: FakeVLLM, server_sampler: VLLMServerSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect, failures = HTTPConnection.connect, iter([True, True])

    def fail_twice(self: HTTPConnection) -> None:
        if next(failures, False):
            raise ConnectionRefusedError
        connect(self)

    monkeypatch.setattr(HTTPConnection, "connect", fail_twice)
    assert len(server_sampler.generate(PROMPTS, CONFIG)) == len(PROMPTS)


def test_a_request_is_not_sent_twice(
    fake_server: FakeVLLM, server_sampler: VLLMServerSampler
) -> None:
    fake_server.answers["/v1/completions"] = die
    with pytest.raises(RuntimeError, match="closed the connection"):
        server_sampler.generate(PROMPTS[:1], CONFIG)
    assert fake_server.paths().count("/v1/completions") == 1
