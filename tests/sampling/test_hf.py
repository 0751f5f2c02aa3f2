"""What only HFSampler promises."""

from dataclasses import replace

import pytest
import torch

from prl_lightning.models.causal_lm import LogprobModel, named_weights
from prl_lightning.models.loading import load_causal_lm
from prl_lightning.sampling import HFSampler, SamplingConfig
from prl_lightning.types import Prompt

TOKEN_IDS = [[5, 14, 7, 17], [9], [4 + i % 9 for i in range(40)]]
PROMPTS = [Prompt(ids, "", seed=11 + 100 * row) for row, ids in enumerate(TOKEN_IDS)]
SAMPLING = SamplingConfig(n=3, temperature=1.0, max_new_tokens=12, stop_token_ids=(1,))


def started(folder: str, batch_size: int = 128) -> HFSampler:
    sampler = HFSampler(batch_size)
    sampler.start(folder, max_model_tokens=64)
    sampler.load_weights(named_weights(LogprobModel(load_causal_lm(folder))))
    return sampler


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="a GPU's kernels round otherwise at another batch size"
)
@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_completions_do_not_depend_on_the_batch_size(tied_model: str, top_p: float) -> None:
    config = replace(SAMPLING, top_p=top_p)
    whole = started(tied_model).generate(PROMPTS, config)
    for batch_size in (1, 2, 5):
        cut = started(tied_model, batch_size).generate(PROMPTS, config)
        for ours, theirs in zip(sum(cut, []), sum(whole, []), strict=True):
            assert ours.token_ids == theirs.token_ids
            assert ours.finished == theirs.finished
            assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)


def test_the_generator_of_the_process_is_left_alone(tied_model: str) -> None:
    sampler = started(tied_model)
    state = torch.get_rng_state()
    sampler.generate(PROMPTS, SAMPLING)
    assert torch.equal(torch.get_rng_state(), state)


def test_weights_that_are_not_sent_are_named(untied_model: str) -> None:
    sampler = HFSampler()
    sampler.start(untied_model, max_model_tokens=64)
    weights = dict(load_causal_lm(untied_model).named_parameters())
    del weights["lm_head.weight"], weights["model.norm.weight"]
    with pytest.raises(RuntimeError, match=r"never sent.*'lm_head.weight', 'model.norm.weight'\]"):
        sampler.load_weights(weights.items())


def test_a_weight_that_the_model_does_not_have_is_named(tied_model: str) -> None:
    sampler = HFSampler()
    sampler.start(tied_model, max_model_tokens=64)
    with pytest.raises(RuntimeError, match=r"'base_model\.adapter'.*has no such weight"):
        sampler.load_weights([("base_model.adapter", torch.zeros(1))])


def test_generate_before_start_says_what_to_call() -> None:
    with pytest.raises(RuntimeError, match=r"call start\(\)"):
        HFSampler().generate(PROMPTS, SAMPLING)
