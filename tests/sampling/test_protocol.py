"""One test of the sampler protocol over all engines, with tied and with untied embeddings."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from engine_gap import trainer_gap
from prl_lightning.models.causal_lm import LogprobModel, named_weights
from prl_lightning.models.loading import load_causal_lm
from prl_lightning.sampling import (
    HFSampler,
    Sampler,
    SamplingConfig,
    SubprocessSampler,
    VLLMSampler,
)
from prl_lightning.types import Prompt

LONG = 200  # above the engines' cache blocks, so that a stale prefix would be reused
TOKEN_IDS = [[5, 14, 7, 17], [9], [4 + i % 9 for i in range(LONG)], [6, 13, 8, 15, 3, 17]]
PROMPTS = [Prompt(ids, "", seed=11 + 100 * row) for row, ids in enumerate(TOKEN_IDS)]
EOS = 1
SAMPLING = SamplingConfig(n=4, temperature=1.0, max_new_tokens=12, stop_token_ids=(EOS,), top_p=1.0)


# test_gpu.py has what holds there.
ON_A_CPU = pytest.mark.skipif(
    torch.cuda.is_available(), reason="a GPU's kernels round otherwise at another batch size"
)


class Engine:
    """A started sampler, the folder of its model, and the trainer's policy that it must follow."""

    def __init__(self, sampler: Sampler, folder: str) -> None:
        self.sampler = sampler
        self.folder = folder
        sampler.start(folder, max_model_tokens=LONG + 56)

    def policy(self, change: float = 0.0) -> LogprobModel:
        """The model of the folder with noise on every weight, and the engine at these weights."""
        policy = LogprobModel(load_causal_lm(self.folder)).eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for weight in policy.parameters():
                weight += change * torch.randn(weight.shape, generator=generator)
        self.sampler.load_weights(named_weights(policy))
        return policy

    def token_ids(
        self, config: SamplingConfig = SAMPLING, seed_offset: int = 0
    ) -> list[list[list[int]]]:
        prompts = [replace(prompt, seed=prompt.seed + seed_offset) for prompt in PROMPTS]
        groups = self.sampler.generate(prompts, config)
        return [[completion.token_ids for completion in group] for group in groups]


@pytest.fixture(
    scope="module",
    params=["hf-tied", "hf-untied", "vllm-tied", "vllm-untied", "process-tied"],
)
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    kind, tie = request.param.split("-")
    sampler: Sampler = HFSampler(batch_size=8) if kind == "hf" else VLLMSampler(cache_gib=0.1)
    if kind == "process":
        sampler = SubprocessSampler(sampler)
    started = Engine(sampler, request.getfixturevalue(f"{tie}_model"))
    yield started
    sampler.stop()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_the_trainers_before_and_after_an_update(
    engine: Engine, temperature: float
) -> None:
    config = replace(SAMPLING, temperature=temperature)
    before = engine.policy()
    groups = engine.sampler.generate(PROMPTS, config)
    assert trainer_gap(before, PROMPTS, groups, temperature).max() < 1e-4
    after = engine.policy(change=0.05)
    groups = engine.sampler.generate(PROMPTS, config)
    assert trainer_gap(after, PROMPTS, groups, temperature).max() < 1e-4
    # The comparison sees a stale weight and a wrong temperature.
    assert trainer_gap(before, PROMPTS, groups, temperature).mean() > 0.05
    assert trainer_gap(after, PROMPTS, groups, temperature + 0.3).mean() > 0.05


def test_an_update_changes_what_is_sampled_and_can_be_taken_back(engine: Engine) -> None:
    engine.policy()
    first = engine.token_ids()
    engine.policy(change=0.05)
    changed = engine.token_ids()
    assert all(old != new for old, new in zip(first, changed, strict=True))
    engine.policy()
    assert engine.token_ids() == first


def test_a_seed_gives_the_same_completions_whatever_was_drawn_in_between(engine: Engine) -> None:
    engine.policy()
    first = engine.token_ids()
    other = engine.token_ids(seed_offset=10_000)
    torch.rand(5)
    assert engine.token_ids() == first
    assert all(ours != theirs for ours, theirs in zip(first, other, strict=True))


def test_completions_of_a_prompt_differ(engine: Engine) -> None:
    engine.policy()
    for group in engine.token_ids(replace(SAMPLING, n=6)):
        assert len({tuple(ids) for ids in group}) >= 4  # two may both end at once


@ON_A_CPU
def test_completions_follow_their_prompts_seed_and_not_its_neighbours(engine: Engine) -> None:
    engine.policy()
    prompt, other = PROMPTS[0], replace(PROMPTS[0], seed=77)
    alone, beside = (
        [[one.token_ids for one in group] for group in engine.sampler.generate(prompts, SAMPLING)]
        for prompts in ([prompt], [PROMPTS[2], other, prompt])
    )
    assert alone[0] == beside[2]
    assert not {tuple(ids) for ids in beside[1]} & {tuple(ids) for ids in beside[2]}


@pytest.mark.parametrize("stop", [(EOS,), (4, 9)], ids=["eos", "others"])
def test_a_completion_ends_at_the_first_stop_token_or_at_the_limit(
    engine: Engine, stop: tuple[int, ...]
) -> None:
    engine.policy()
    config = replace(SAMPLING, n=16, stop_token_ids=stop)
    completions = [one for group in engine.sampler.generate(PROMPTS, config) for one in group]
    for one in completions:
        assert one.finished == (one.token_ids[-1] in stop)
        assert not set(one.token_ids[:-1]) & set(stop)
        assert one.finished or len(one.token_ids) == config.max_new_tokens
        assert len(one.token_ids) == len(one.logprobs) <= config.max_new_tokens
    assert {one.finished for one in completions} == {True, False}


def test_groups_come_in_the_order_of_the_prompts(engine: Engine) -> None:
    policy = engine.policy()
    lengths = [7, 1, 30, 2, 13, 1]
    prompts = [Prompt([4 + row] * size, "", seed=100 * row) for row, size in enumerate(lengths)]
    groups = engine.sampler.generate(prompts, replace(SAMPLING, n=2))
    assert [len(group) for group in groups] == [2] * len(prompts)
    assert trainer_gap(policy, prompts, groups, 1.0).max() < 1e-4
    rolled = prompts[1:] + prompts[:1]
    assert trainer_gap(policy, rolled, groups, 1.0).mean() > 0.05


def test_progress_adds_up_to_what_is_drawn(engine: Engine) -> None:
    engine.policy()
    told: list[tuple[int, int]] = []
    groups = engine.sampler.generate(PROMPTS, SAMPLING, lambda *more: told.append(more))
    tokens = sum(len(one.token_ids) for group in groups for one in group)
    assert [sum(column) for column in zip(*told, strict=True)] == [len(PROMPTS), tokens]
    assert len(told) > 1
    engine.sampler.generate(PROMPTS[:1], SAMPLING)  # nobody is told any more
    assert sum(prompts for prompts, _ in told) == len(PROMPTS)


@ON_A_CPU
def test_many_long_prompts_are_read_with_their_seeds(engine: Engine) -> None:
    """More tokens than the engine takes in a step: no prompt may be read in parts on a CPU."""
    engine.policy()
    prompts = [
        Prompt([3 + (row // 15**place) % 15 for place in range(LONG)], "", seed=row)
        for row in range(48)
    ]
    sampling = replace(SAMPLING, n=1, max_new_tokens=2)
    together, last = (engine.sampler.generate(rows, sampling) for rows in (prompts, prompts[-4:]))
    assert [g[0].token_ids for g in together[-4:]] == [g[0].token_ids for g in last]


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.0, 0.8)])
def test_first_tokens_follow_the_exact_distribution(
    engine: Engine, temperature: float, top_p: float
) -> None:
    engine.policy()
    exact = next_token_probabilities(engine.folder, TOKEN_IDS[0], temperature, top_p)
    config = replace(SAMPLING, n=2000, temperature=temperature, top_p=top_p, max_new_tokens=1)
    (group,) = engine.sampler.generate(PROMPTS[:1], config)
    sampled = torch.tensor([one.token_ids[0] for one in group])
    counts = torch.bincount(sampled, minlength=len(exact)).double()
    assert counts[exact == 0].sum() == 0
    # Pearson's statistic: its mean is the degrees of freedom, its variance twice that.
    expected = len(group) * exact
    often = expected >= 5
    statistic = ((counts - expected).square() / expected)[often].sum()
    freedom = int(often.sum()) - 1
    assert freedom >= 5
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5
    # And the log-probabilities reported are those of this distribution.
    reported = torch.tensor([one.logprobs[0] for one in group], dtype=torch.double)
    torch.testing.assert_close(reported, exact[sampled].log(), atol=1e-4, rtol=0)


@torch.no_grad()
def next_token_probabilities(
    folder: str, prompt: list[int], temperature: float, top_p: float
) -> Tensor:
    """(V,) by plain loops over the model's own logits."""
    logits = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([prompt])).logits[0, -1]
    probabilities = (logits.double() / temperature).softmax(-1)
    kept, mass = torch.zeros_like(probabilities), 0.0
    for token in probabilities.argsort(descending=True).tolist():
        if mass < top_p:
            kept[token] = probabilities[token]
            mass += float(probabilities[token])
    return kept / kept.sum()
