"""What VLLMServerSampler asks of a server, and says if it fails; the server is a fake."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from safetensors.torch import load_file

from fake_vllm import Answer, FakeVLLM, Handler, fake_vllm
from prl_lightning.cli import main
from prl_lightning.models.causal_lm import named_weights
from prl_lightning.models.loading import load_policy
from prl_lightning.sampling import (
    FolderTransfer,
    SamplingConfig,
    VLLMServerSampler,
    server_client,
    server_facts,
    weight_transfer,
)
from prl_lightning.types import Completion, Prompt
from tiny_runs import ARITHMETIC, tiny_overrides

CONFIG = SamplingConfig(n=2, temperature=1.0, max_new_tokens=8, stop_token_ids=(1,))
PROMPTS = [Prompt([5, 6], "", seed=10 * row) for row in range(3)]
WEIGHTS = [("model.norm.weight", torch.ones(3)), ("lm_head.weight", torch.ones(2, 3))]


@pytest.fixture
def server(tied_model: str) -> Iterator[FakeVLLM]:
    with fake_vllm(tied_model) as server:
        yield server


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_client, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(server_facts, "POLL_SECONDS", 0.01)


@pytest.fixture
def make(server: FakeVLLM, tmp_path: Path) -> Callable[..., VLLMServerSampler]:
    def make(**init: Any) -> VLLMServerSampler:
        init = {"transfer": FolderTransfer(str(tmp_path)), "start_timeout": 60.0} | init
        return VLLMServerSampler(server.url, **init)

    return make


@pytest.fixture
def sampler(make: Callable[..., VLLMServerSampler], tied_model: str) -> VLLMServerSampler:
    """Started, with weights."""
    sampler = make()
    sampler.start(tied_model, 64)
    sampler.load_weights(WEIGHTS)
    return sampler


def refuse(status: int, message: str) -> Answer:
    return lambda handler, body: handler.give(status, {"error": {"message": message}})


def die(handler: Handler, body: Any) -> None:
    """Close the connection in the middle of an answer."""
    handler.begin()
    handler.piece(0, [5], None)
    handler.close_connection = True


# Before anything is loaded


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://127.0.0.1", "http://"])
def test_another_form_of_url(url: str) -> None:
    with pytest.raises(ValueError, match=rf"VLLMServerSampler\.url='{url}'.*http://127"):
        VLLMServerSampler(url)


def test_no_server_at_the_url(tied_model: str) -> None:
    url = f"http://127.0.0.1:{find_free_network_port()}"
    message = rf"start_timeout=0 .*VLLMServerSampler\.url={url}: no server answers.*Start it"
    with pytest.raises(ValueError, match=message):
        VLLMServerSampler(url, start_timeout=0.0).start(tied_model, 8)


def test_a_server_that_does_not_become_healthy(
    server: FakeVLLM, make: Callable[..., VLLMServerSampler]
) -> None:
    server.answers["/health"] = refuse(503, "engine is dead")
    (message,) = make(start_timeout=0.1).missing_requirements()
    assert "start_timeout=0.1" in message
    assert "/health answered 503: engine is dead" in message
    assert len(server.calls) > 1


def test_a_server_that_is_starting_is_waited_for(
    server: FakeVLLM, make: Callable[..., VLLMServerSampler]
) -> None:
    def not_yet(handler: Handler, body: Any) -> None:
        if len(server.calls) == 3:
            del server.answers["/health"]
        handler.give(503, None)

    server.answers["/health"] = not_yet
    assert make().missing_requirements() == []


@pytest.mark.parametrize(
    ("path", "answer", "message"),
    [
        ("/server_info", refuse(404, "Not Found"), "VLLM_SERVER_DEV_MODE=1"),
        ("/server_info", refuse(500, "broken"), "/server_info.* answered 500: broken"),
        ("/v1/models", refuse(401, "Unauthorized"), "/v1/models answered 401: Unauthorized"),
    ],
)
def test_endpoints_that_are_missing(
    server: FakeVLLM,
    make: Callable[..., VLLMServerSampler],
    path: str,
    answer: Answer,
    message: str,
) -> None:
    server.answers[path] = answer
    with pytest.raises(ValueError, match=message):
        make().start("model", 8)


def test_a_server_of_something_else(
    server: FakeVLLM, make: Callable[..., VLLMServerSampler]
) -> None:
    def page(handler: Handler, body: Any) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "6")
        handler.end_headers()
        handler.wfile.write(b"<html>")

    server.answers["/health"] = page
    (message,) = make(start_timeout=0.0).missing_requirements()
    assert "'<html>'" in message
    assert "Is this a vLLM server?" in message


@pytest.mark.parametrize(
    ("section", "field", "value", "fix"),
    [
        ("model_config", "logprobs_mode", "raw_logprobs", "--logprobs-mode processed_logprobs"),
        ("scheduler_config", "enable_chunked_prefill", True, "--no-enable-chunked-prefill"),
        ("load_config", "load_format", "dummy", "without --load-format"),
    ],
)
def test_settings_of_the_server(
    server: FakeVLLM,
    make: Callable[..., VLLMServerSampler],
    section: str,
    field: str,
    value: object,
    fix: str,
) -> None:
    server.config[section][field] = value
    (message,) = make().missing_requirements()
    assert f"{field}={value}".lower() in message.lower()
    assert fix in message


def test_experts_without_a_gpu(server: FakeVLLM, make: Callable[..., VLLMServerSampler]) -> None:
    server.model_text += "\n(experts): FusedMoE()"
    (message,) = make().missing_requirements()
    assert "mixture of experts" in message
    server.config["device_config"]["device"] = "cuda"
    assert make().missing_requirements() == []


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"id": "other", "root": "there"}, r"serves 'other'.*--served-model-name"),
        ({"max_model_len": 63}, r"max_model_len=63, .* 64 tokens.*--max-model-len 64"),
    ],
)
def test_another_model(
    server: FakeVLLM,
    make: Callable[..., VLLMServerSampler],
    tied_model: str,
    attributes: dict[str, Any],
    message: str,
) -> None:
    server.models[0] |= attributes
    with pytest.raises(ValueError, match=message):
        make().start(tied_model, 64)


def test_another_vocabulary(
    server: FakeVLLM, make: Callable[..., VLLMServerSampler], tied_model: str
) -> None:
    server.model_text = "Embedding(org_vocab_size=21)"
    with pytest.raises(ValueError, match=r"vocabulary of 20 tokens, .* has 21"):
        make().start(tied_model, 64)


def test_a_model_under_a_served_name(
    server: FakeVLLM, make: Callable[..., VLLMServerSampler], tied_model: str
) -> None:
    """The folder may have another name there, and the request has that of the server."""
    server.models[0] = {"id": "served", "root": tied_model, "max_model_len": 64}
    sampler = make()
    sampler.start(tied_model, 64)
    sampler.load_weights(WEIGHTS)
    sampler.generate(PROMPTS[:1], CONFIG)
    (body,) = [body for path, body in server.calls if path == "/v1/completions"]
    assert body["model"] == "served"


def test_prl_check_reads_the_example_of_the_page_and_asks_no_server(
    tied_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = Path(__file__).parents[2] / "docs" / "engines.md"
    (example,) = re.findall(r"```yaml\n([^`]*VLLMServerSampler[^`]*)```", page.read_text())
    (tmp_path / "server.yaml").write_text(example)
    overrides = [
        one for one in tiny_overrides(tied_model, tmp_path) if "rollout.sampler=" not in one
    ]
    server = f"--config={tmp_path / 'server.yaml'}"
    main(["check", f"--config={ARITHMETIC}", server, *overrides])
    assert "on the vLLM server http://127.0.0.1:8000" in capsys.readouterr().out


def test_the_key_of_the_server(
    server: FakeVLLM, make: Callable[..., VLLMServerSampler], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "a-key")
    make().missing_requirements()
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer a-key"}


# Sampling


def completions(group: list[Completion]) -> list[tuple[list[int], bool]]:
    return [(one.token_ids, one.finished) for one in group]


def test_pieces_become_groups_in_the_order_of_the_prompts(
    server: FakeVLLM, sampler: VLLMServerSampler
) -> None:
    groups = sampler.generate(PROMPTS, CONFIG)
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
    server: FakeVLLM, sampler: VLLMServerSampler, answer: Answer, message: str
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

    server.answers["/v1/completions"] = answer_some
    with pytest.raises(RuntimeError, match=message):
        sampler.generate(PROMPTS, CONFIG, keep)
    assert {row: completions(group) for row, group in kept.items()} == {
        0: [([0, 0], True), ([0, 1], True)]
    }
    del server.answers["/v1/completions"]
    assert len(sampler.generate(PROMPTS, CONFIG)) == len(PROMPTS)  # the next call is whole


def test_an_error_in_the_stream(server: FakeVLLM, sampler: VLLMServerSampler) -> None:
    def fail(handler: Handler, body: Any) -> None:
        handler.begin()
        handler.event('{"error": {"message": "out of memory"}}')

    server.answers["/v1/completions"] = fail
    with pytest.raises(RuntimeError, match="/v1/completions failed: out of memory"):
        sampler.generate(PROMPTS, CONFIG)


def wait_for_the_client(handler: Handler, body: Any) -> None:
    handler.rfile.read(1)  # until it closes the connection


def test_a_server_that_sends_no_token(server: FakeVLLM, sampler: VLLMServerSampler) -> None:
    sampler.timeout = 0.2
    server.answers["/v1/completions"] = wait_for_the_client
    with pytest.raises(RuntimeError, match=r"no token arrived within timeout=0\.2 seconds"):
        sampler.generate(PROMPTS, CONFIG)


def test_stop_ends_a_call_in_another_thread(server: FakeVLLM, sampler: VLLMServerSampler) -> None:
    is_sampling = Event()

    def begin(handler: Handler, body: Any) -> None:
        is_sampling.set()
        wait_for_the_client(handler, body)

    server.answers["/v1/completions"] = begin
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(sampler.generate, PROMPTS, CONFIG)
        assert is_sampling.wait(timeout=600)
        sampler.stop()
        assert isinstance(running.exception(timeout=600), RuntimeError)


def test_connecting_is_tried_again(
    server: FakeVLLM, sampler: VLLMServerSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect, failures = HTTPConnection.connect, iter([True, True])

    def fail_twice(self: HTTPConnection) -> None:
        if next(failures, False):
            raise ConnectionRefusedError
        connect(self)

    monkeypatch.setattr(HTTPConnection, "connect", fail_twice)
    assert len(sampler.generate(PROMPTS, CONFIG)) == len(PROMPTS)


def test_a_request_is_not_sent_twice(server: FakeVLLM, sampler: VLLMServerSampler) -> None:
    server.answers["/v1/completions"] = die
    with pytest.raises(RuntimeError, match="closed the connection"):
        sampler.generate(PROMPTS[:1], CONFIG)
    assert server.paths().count("/v1/completions") == 1


# Weights


def test_the_server_is_paused_while_it_takes_weights(
    server: FakeVLLM, sampler: VLLMServerSampler
) -> None:
    assert server.paths()[-5:] == [
        "/pause?mode=wait",
        "/collective_rpc",
        "/reset_prefix_cache",
        "/update_weight_version",
        "/resume",
    ]


@pytest.mark.parametrize("has_head", [True, False])
def test_the_folder_has_the_weights_of_the_model(
    server: FakeVLLM,
    sampler: VLLMServerSampler,
    tied_model: str,
    has_head: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In several files; with the tied head only if the engine has one."""
    monkeypatch.setattr(weight_transfer, "PART_BYTES", 20_000)
    policy, files = load_policy(tied_model), list[dict[str, torch.Tensor]]()

    def read(handler: Handler, body: Any) -> None:
        assert body["method"] == "reload_weights"
        folder = Path(body["kwargs"]["weights_path"])
        files.extend(load_file(file) for file in folder.glob("*.safetensors"))
        handler.give(200, {"results": [None]})

    if not has_head:
        server.model_text = server.model_text.partition("\n")[0]
    sampler.start(tied_model, 64)
    server.answers["/collective_rpc"] = read
    sampler.load_weights(named_weights(policy))
    assert len(files) > 2
    found = {name: tensor for file in files for name, tensor in file.items()}
    expected = dict(named_weights(policy))
    if not has_head:
        del expected["lm_head.weight"]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_server_that_does_not_take_the_weights(
    server: FakeVLLM, sampler: VLLMServerSampler, tmp_path: Path
) -> None:
    server.answers["/collective_rpc"] = refuse(500, "size mismatch")
    with pytest.raises(RuntimeError, match=rf"FolderTransfer\.folder={tmp_path}.*size mismatch"):
        sampler.load_weights(WEIGHTS)
    assert not server.is_paused
    server.answers = {
        "/reset_prefix_cache": lambda handler, _: handler.give(200, {"success": False})
    }
    with pytest.raises(RuntimeError, match="did not reset its prefix cache"):
        sampler.load_weights(WEIGHTS)


def test_a_folder_that_cannot_be_written(
    server: FakeVLLM, make: Callable[..., VLLMServerSampler], tmp_path: Path
) -> None:
    folder = tmp_path / "none"
    sampler = make(transfer=FolderTransfer(str(folder)))
    (message,) = sampler.missing_requirements()
    assert f"FolderTransfer.folder={folder}: there is no such folder" in message
    weights = iter(WEIGHTS)
    with pytest.raises(RuntimeError, match=rf"FolderTransfer\.folder={folder}.*No such file"):
        sampler.load_weights(weights)
    assert next(weights, None) is None  # other ranks iterate to the end, too


def test_a_server_that_takes_weights_too_late(server: FakeVLLM, sampler: VLLMServerSampler) -> None:
    def pause(handler: Handler, body: Any) -> None:
        sampler._client.timeout = 0.2  # not before: this answer may take longer
        handler.give(200, {"status": "paused"})

    server.answers = {"/pause": pause, "/collective_rpc": wait_for_the_client}
    with pytest.raises(RuntimeError, match=r"/collective_rpc was not answered within timeout=0\.2"):
        sampler.load_weights(WEIGHTS)


@pytest.mark.parametrize("when", ["before", "during"])
def test_a_server_that_was_restarted_is_noticed(
    server: FakeVLLM, sampler: VLLMServerSampler, when: str
) -> None:
    def restart(*_: Any) -> None:
        server.weight_version = "default"

    if when == "before":
        restart()
    with pytest.raises(RuntimeError, match=r"weight_version='default'.* sent 'prl-"):
        sampler.generate(PROMPTS, CONFIG, restart)


def test_without_start(make: Callable[..., VLLMServerSampler]) -> None:
    with pytest.raises(RuntimeError, match=r"start\(\)"):
        make().load_weights(WEIGHTS)
