"""What only HFSampler guarantees; for the rest see test_protocol.py."""

from dataclasses import replace

import pytest
import torch

from prl_lightning.models.causal_lm import named_weights
from prl_lightning.models.loading import load_policy
from prl_lightning.sampling import HFSampler, SamplingConfig
from prl_lightning.types import Prompt

TOKEN_IDS = [[5, 14, 7, 17], [9], [4 + i % 9 for i in range(40)]]
PROMPTS = [Prompt(ids, "", seed=11 + 100 * row) for row, ids in enumerate(TOKEN_IDS)]
SAMPLING = SamplingConfig(n=3, temperature=1.0, max_new_tokens=12, stop_token_ids=(1,))


@pytest.fixture
def sampler(untied_model: str) -> HFSampler:
    started = HFSampler()
    started.start(untied_model, max_model_tokens=64)
    return started


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels of a GPU round differently at another batch size"
)
@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_completions_do_not_depend_on_the_batch_size(
    sampler: HFSampler, untied_model: str, top_p: float
) -> None:
    sampler.load_weights(named_weights(load_policy(untied_model)))
    config = replace(SAMPLING, top_p=top_p)
    whole = sum(sampler.generate(PROMPTS, config), [])
    for sampler.batch_size in (1, 2, 5):
        for ours, theirs in zip(sum(sampler.generate(PROMPTS, config), []), whole, strict=True):
            assert replace(ours, logprobs=[]) == replace(theirs, logprobs=[])
            assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)


def test_the_global_generator_is_not_used(sampler: HFSampler) -> None:
    state = torch.get_rng_state()
    sampler.generate(PROMPTS, SAMPLING)
    assert torch.equal(torch.get_rng_state(), state)


def test_missing_and_unknown_weights_are_named(sampler: HFSampler, untied_model: str) -> None:
    weights = dict(named_weights(load_policy(untied_model)))
    del weights["lm_head.weight"], weights["model.norm.weight"]
    with pytest.raises(RuntimeError, match=r"\['lm_head.weight', 'model.norm.weight'\]"):
        sampler.load_weights(weights.items())
    with pytest.raises(RuntimeError, match=r"'base_model\.adapter'"):
        sampler.load_weights([("base_model.adapter", torch.zeros(1))])


def test_generate_before_start() -> None:
    with pytest.raises(RuntimeError, match=r"HFSampler.*start\(\)"):
        HFSampler().generate(PROMPTS, SAMPLING)
