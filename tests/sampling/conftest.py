"""A fake vLLM server, and samplers that use it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fake_vllm import WEIGHTS, FakeVLLM, fake_vllm
from prl_lightning.sampling import FolderTransfer, VLLMServerSampler, server_client, server_facts

MakeSampler = Callable[..., VLLMServerSampler]


@pytest.fixture
def fake_server(tied_model: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeVLLM]:
    monkeypatch.setattr(server_client, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(server_facts, "POLL_SECONDS", 0.01)
    with fake_vllm(tied_model) as server:
        yield server


@pytest.fixture
def make_sampler(fake_server: FakeVLLM, tmp_path: Path) -> MakeSampler:
    def make(**init: Any) -> VLLMServerSampler:
        init = {"transfer": FolderTransfer(str(tmp_path)), "start_timeout": 60.0} | init
        return VLLMServerSampler(fake_server.url, **init)

    return make


@pytest.fixture
def server_sampler(make_sampler: MakeSampler, tied_model: str) -> VLLMServerSampler:
    """Started, with weights."""
    sampler = make_sampler()
    sampler.start(tied_model, 64)
    sampler.load_weights(WEIGHTS)
    return sampler
