"""What VLLMServerSampler asks of a server before anything is loaded; the server is a fake."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from lightning.fabric.plugins.environments.lightning import find_free_network_port

from fake_vllm import WEIGHTS, Answer, FakeVLLM, Handler, refuse
from prl_lightning.cli import main
from prl_lightning.sampling import (
    SamplingConfig,
    VLLMServerSampler,
)
from prl_lightning.types import Prompt
from sampling.conftest import MakeSampler
from tiny_runs import ARITHMETIC, tiny_overrides

CONFIG = SamplingConfig(n=2, temperature=1.0, max_new_tokens=8, stop_token_ids=(1,))
PROMPTS = [Prompt([5, 6], "", seed=10 * row) for row in range(3)]


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://127.0.0.1", "http://", "http://a:b"])
def test_another_form_of_url(url: str) -> None:
    with pytest.raises(ValueError, match=rf"VLLMServerSampler\.url='{url}'.*http://127"):
        VLLMServerSampler(url)


@pytest.mark.parametrize("field", ["timeout", "concurrency"])
def test_numbers_that_would_sample_nothing(field: str) -> None:
    with pytest.raises(ValueError, match=rf"VLLMServerSampler\.{field}=0: must be above 0"):
        VLLMServerSampler(**{field: 0})


def test_no_server_at_the_url(tied_model: str) -> None:
    url = f"http://127.0.0.1:{find_free_network_port()}"
    message = rf"start_timeout=0 .*VLLMServerSampler\.url={url}: no server answers.*Start it"
    with pytest.raises(ValueError, match=message):
        VLLMServerSampler(url, start_timeout=0.0).start(tied_model, 8)


def test_a_server_that_does_not_become_healthy(
    fake_server: FakeVLLM, make_sampler: MakeSampler
) -> None:
    fake_server.answers["/health"] = refuse(503, "engine is dead")
    (message,) = make_sampler(start_timeout=0.1).missing_requirements()
    assert "start_timeout=0.1" in message
    assert "/health answered 503: engine is dead" in message


def test_a_server_that_is_starting_is_waited_for(
    fake_server: FakeVLLM, make_sampler: MakeSampler
) -> None:
    def not_yet(handler: Handler, body: Any) -> None:
        if len(fake_server.calls) == 3:
            del fake_server.answers["/health"]
        handler.give(503, None)

    fake_server.answers["/health"] = not_yet
    assert make_sampler().missing_requirements() == []


@pytest.mark.parametrize(
    ("path", "answer", "message"),
    [
        ("/server_info", refuse(404, "Not Found"), "VLLM_SERVER_DEV_MODE=1"),
        ("/server_info", refuse(500, "broken"), "/server_info.* answered 500: broken"),
        ("/v1/models", refuse(401, "Unauthorized"), "/v1/models answered 401: Unauthorized"),
    ],
)
def test_endpoints_that_are_missing(
    fake_server: FakeVLLM,
    make_sampler: MakeSampler,
    path: str,
    answer: Answer,
    message: str,
) -> None:
    fake_server.answers[path] = answer
    with pytest.raises(ValueError, match=message):
        make_sampler().start("model", 8)


def test_another_version_of_vllm(fake_server: FakeVLLM, make_sampler: MakeSampler) -> None:
    fake_server.version = "0.31.9"
    (message,) = make_sampler().missing_requirements()
    assert "has vllm 0.31.9, but vllm>=0.32,<0.34" in message


def test_a_server_of_something_else(fake_server: FakeVLLM, make_sampler: MakeSampler) -> None:
    def page(handler: Handler, body: Any) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "6")
        handler.end_headers()
        handler.wfile.write(b"<html>")

    fake_server.answers["/health"] = page
    (message,) = make_sampler(start_timeout=0.0).missing_requirements()
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
    fake_server: FakeVLLM,
    make_sampler: MakeSampler,
    section: str,
    field: str,
    value: object,
    fix: str,
) -> None:
    fake_server.config[section][field] = value
    (message,) = make_sampler().missing_requirements()
    assert f"{field}={value}".lower() in message.lower()
    assert fix in message


def test_experts_without_a_gpu(fake_server: FakeVLLM, make_sampler: MakeSampler) -> None:
    fake_server.model_text += "\n(experts): FusedMoE()"
    (message,) = make_sampler().missing_requirements()
    assert "mixture of experts" in message
    fake_server.config["device_config"]["device"] = "cuda"
    assert make_sampler().missing_requirements() == []


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"id": "other", "root": "there"}, r"serves 'other'.*--served-model-name"),
        ({"max_model_len": 63}, r"max_model_len=63, .* 64 tokens.*--max-model-len 64"),
    ],
)
def test_another_model(
    fake_server: FakeVLLM,
    make_sampler: MakeSampler,
    tied_model: str,
    attributes: dict[str, Any],
    message: str,
) -> None:
    fake_server.models[0] |= attributes
    with pytest.raises(ValueError, match=message):
        make_sampler().start(tied_model, 64)


def test_another_vocabulary(
    fake_server: FakeVLLM, make_sampler: MakeSampler, tied_model: str
) -> None:
    fake_server.model_text = "Embedding(org_vocab_size=21)"
    with pytest.raises(ValueError, match=r"vocabulary of 20 tokens, .* has 21"):
        make_sampler().start(tied_model, 64)


def test_a_model_under_a_served_name(
    fake_server: FakeVLLM, make_sampler: MakeSampler, tied_model: str
) -> None:
    """The folder may have another name there, and the request has that of the server."""
    fake_server.models[0] = {"id": "served", "root": tied_model, "max_model_len": 64}
    sampler = make_sampler()
    sampler.start(tied_model, 64)
    sampler.load_weights(WEIGHTS)
    sampler.generate(PROMPTS[:1], CONFIG)
    (body,) = [body for path, body in fake_server.calls if path == "/v1/completions"]
    assert body["model"] == "served"


def test_prl_check_reads_the_example_of_the_page_and_asks_no_server(
    tied_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = Path(__file__).parents[2] / "docs" / "engines.md"
    (example,) = re.findall(r"```yaml\n([^`]*VLLMServerSampler[^`]*)```", page.read_text())
    (tmp_path / "fake_server.yaml").write_text(example)
    overrides = [
        one for one in tiny_overrides(tied_model, tmp_path) if "rollout.sampler=" not in one
    ]
    server = f"--config={tmp_path / 'fake_server.yaml'}"
    main(["check", f"--config={ARITHMETIC}", server, *overrides])
    assert "on the vLLM server http://127.0.0.1:8000" in capsys.readouterr().out


def test_the_key_of_the_server(
    fake_server: FakeVLLM, make_sampler: MakeSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "a-key")
    make_sampler().missing_requirements()
    assert {headers["Authorization"] for headers in fake_server.headers} == {"Bearer a-key"}
