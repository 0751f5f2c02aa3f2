"""The guarantees of the Sampler interface, for all engines, with tied and untied embeddings."""

import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from engine_gap import trainer_gap
from prl_lightning.models.causal_lm import LogprobModel, named_weights
from prl_lightning.models.loading import load_causal_lm, load_policy, load_tokenizer
from prl_lightning.runs.heap import drop_pages
from prl_lightning.sampling import (
    HFSampler,
    Sampler,
    SamplingConfig,
    SubprocessSampler,
    VLLMSampler,
    vllm_internals,
)
from prl_lightning.sampling.base import MIN_TEMPERATURE
from prl_lightning.types import Completion, Prompt

pytestmark = pytest.mark.process

LONG = 200  # longer than the engines' cache blocks, so that a stale prefix would be reused
TOKEN_IDS = [[5, 14, 7, 17], [9], [4 + i % 9 for i in range(LONG)], [6, 13, 8, 15, 3, 17]]
PROMPTS = [Prompt(ids, "", seed=11 + 100 * row) for row, ids in enumerate(TOKEN_IDS)]
EOS = 1
SAMPLING = SamplingConfig(n=4, temperature=1.0, max_new_tokens=12, stop_token_ids=(EOS,), top_p=1.0)

# For a GPU see test_gpu_engine.py.
ON_A_CPU = pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels of a GPU round differently at another batch size"
)


class Engine:
    """A started sampler, and the trainer's policy before and after an update."""

    def __init__(self, sampler: Sampler, folder: str) -> None:
        self.sampler, self.folder = sampler, folder
        self.before, self.after = load_policy(folder), load_policy(folder)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for weight in self.after.parameters():
                weight += 0.05 * torch.randn(weight.shape, generator=generator)
        sampler.start(folder, max_model_tokens=LONG + 56)
        self.load(self.before)

    def load(self, policy: LogprobModel) -> None:
        self.sampler.load_weights(named_weights(policy))

    def tokens(self, prompts: Sequence[Prompt], config: SamplingConfig) -> list[list[list[int]]]:
        return tokens_of(self.sampler.generate(prompts, config))


def tokens_of(groups: list[list[Completion]]) -> list[list[list[int]]]:
    return [[completion.token_ids for completion in group] for group in groups]


@pytest.fixture(
    scope="module", params=["hf-tied", "hf-untied", "vllm-tied", "vllm-untied", "subprocess-tied"]
)
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """At the weights before the update."""
    kind, tie = request.param.split("-")
    folder = request.getfixturevalue(f"{tie}_model")
    sampler: Sampler = HFSampler() if kind == "hf" else VLLMSampler(cache_gib=0.1)
    if kind == "subprocess":
        sampler = SubprocessSampler(sampler)
    yield Engine(sampler, folder)
    sampler.stop()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_samples_and_logprobs_follow_an_update_and_its_reversal(
    engine: Engine, temperature: float
) -> None:
    config = replace(SAMPLING, temperature=temperature)
    old = engine.sampler.generate(PROMPTS, config)
    assert trainer_gap(engine.before, PROMPTS, old, temperature).max() < 1e-4
    engine.load(engine.after)
    new = engine.sampler.generate(PROMPTS, config)
    assert trainer_gap(engine.after, PROMPTS, new, temperature).max() < 1e-4
    # The comparison detects stale weights and a wrong temperature.
    assert trainer_gap(engine.before, PROMPTS, new, temperature).mean() > 0.05
    assert trainer_gap(engine.after, PROMPTS, new, temperature + 0.3).mean() > 0.05
    assert all(map(list.__ne__, tokens_of(old), tokens_of(new)))
    torch.rand(5)  # the global generator has no influence
    engine.load(engine.before)
    assert engine.tokens(PROMPTS, config) == tokens_of(old)


def packed(model: nn.Module) -> list[Any]:
    """References to what holds each packed matrix of vLLM's CPU build."""
    layers: list[Any] = [one for one in model.modules() if hasattr(one, "cpu_linear")]
    kernels = [layer.cpu_linear for layer in layers if layer.cpu_linear is not None]
    return [weakref.ref(cell.cell_contents) for one in kernels for cell in one.__closure__]


def cached(model: nn.Module) -> int:
    """Number of values in the cache of vLLM's CPU build that are not zero."""
    layers: list[Any] = [one for one in model.modules() if hasattr(one, "kv_cache")]
    assert layers
    return sum(int(layer.kv_cache.count_nonzero()) for layer in layers)


def tables(model: nn.Module) -> set[tuple[int, int]]:
    """Address and size of embedding and head."""
    layers: list[Any] = [one for one in model.modules() if hasattr(one, "shard_indices")]
    return {(one.weight.data_ptr(), 4 * one.weight.numel()) for one in layers}


@ON_A_CPU
def test_released_weights_are_freed_and_come_back(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropped: set[tuple[int, int]] = set()

    def drop_and_note(address: int, size: int) -> None:
        drop_pages(address, size)
        dropped.add((address, size))

    monkeypatch.setattr(vllm_internals, "drop_pages", drop_and_note)
    before = engine.tokens(PROMPTS, SAMPLING)
    if isinstance(engine.sampler, VLLMSampler):
        (matrices,) = engine.sampler._llm.apply_model(packed)
        assert len(matrices) == 9  # four of each of two layers, and the head; not the embeddings
        assert all(matrix() is not None for matrix in matrices)
        (used,) = engine.sampler._llm.apply_model(cached)
        assert engine.sampler.release_weights()
        assert all(matrix() is None for matrix in matrices)
        (left,) = engine.sampler._llm.apply_model(cached)
        assert left < used / 2  # no more than parts of pages
        (embeddings,) = engine.sampler._llm.apply_model(tables)
        assert embeddings
        assert embeddings <= dropped
        engine.load(engine.before)
    else:
        assert not engine.sampler.release_weights()
    assert engine.tokens(PROMPTS, SAMPLING) == before


@ON_A_CPU
def test_an_engine_that_is_not_compiled_compiles_nothing(engine: Engine) -> None:
    torch._dynamo.reset()
    counters.clear()
    engine.tokens(PROMPTS, SAMPLING)
    assert not counters["stats"]


def test_each_seed_has_other_completions(engine: Engine) -> None:
    config = replace(SAMPLING, n=6)
    first = engine.tokens(PROMPTS, config)
    other = engine.tokens(
        [replace(prompt, seed=prompt.seed + 10_000) for prompt in PROMPTS], config
    )
    assert all(map(list.__ne__, first, other))
    for group in first:
        assert len({tuple(ids) for ids in group}) >= 4  # two may both end at once


@ON_A_CPU
def test_completions_depend_on_the_prompts_seed_and_not_on_other_prompts(engine: Engine) -> None:
    prompt, other = PROMPTS[0], replace(PROMPTS[0], seed=77)
    (alone,) = engine.tokens([prompt], SAMPLING)
    _, of_other, in_batch = engine.tokens([PROMPTS[2], other, prompt], SAMPLING)
    assert alone == in_batch
    assert not {tuple(ids) for ids in of_other} & {tuple(ids) for ids in in_batch}


@pytest.mark.parametrize("stop", [(EOS,), (4, 9)], ids=["eos", "others"])
def test_a_completion_ends_at_the_first_stop_token_or_at_the_limit(
    engine: Engine, stop: tuple[int, ...]
) -> None:
    config = replace(SAMPLING, n=16, stop_token_ids=stop)
    completions = sum(engine.sampler.generate(PROMPTS, config), [])
    for one in completions:
        assert one.finished == (one.token_ids[-1] in stop)
        assert not set(one.token_ids[:-1]) & set(stop)
        assert one.finished or one.length == config.max_new_tokens
        assert one.length == len(one.logprobs) <= config.max_new_tokens
    assert {one.finished for one in completions} == {True, False}


def test_a_completion_ends_with_the_token_that_completes_a_stop_text(engine: Engine) -> None:
    """Texts of several tokens, found in the same completions without stops."""
    config = replace(SAMPLING, n=16, temperature=2.0, stop_token_ids=())
    tokenizer = load_tokenizer(engine.folder)
    free = sum(engine.sampler.generate(PROMPTS, config), [])
    texts = tuple(tokenizer.decode(one.token_ids[2:4]) for one in free[::16])
    limited = replace(config, stop_texts=texts)
    stopped = sum(engine.sampler.generate(PROMPTS, limited), [])
    for long, short in zip(free, stopped, strict=True):
        starts = [tokenizer.decode(long.token_ids[: end + 1]) for end in range(long.length)]
        end = next((i + 1 for i, text in enumerate(starts) if any(map(text.count, texts))), None)
        assert short.token_ids == long.token_ids[:end]
        assert short.finished == (end is not None)
        assert len(short.logprobs) == short.length
    assert {one.finished for one in stopped} == {True, False}
    # Ordinary sampling afterwards does not remember them.
    assert engine.tokens(PROMPTS, config) == tokens_of([free[i : i + 16] for i in (0, 16, 32, 48)])


def test_temperature_0_is_greedy(engine: Engine) -> None:
    """All completions of a prompt are one; its log-probabilities are those at temperature 1."""
    config = replace(SAMPLING, temperature=0.0)
    reports: list[tuple[Mapping[int, list[Completion]], int]] = []
    groups = engine.sampler.generate(PROMPTS, config, lambda *numbers: reports.append(numbers))
    model = load_causal_lm(engine.folder)
    for prompt, group in zip(PROMPTS, groups, strict=True):
        first, *others = group
        assert others == [first] * (config.n - 1)
        row = list(prompt.token_ids)
        for token in first.token_ids:
            assert token == model(torch.tensor([row])).logits[0, -1].argmax()
            row.append(token)
        assert first.finished == (row[-1] == EOS)
    assert trainer_gap(engine.before, PROMPTS, groups).max() < 1e-4
    low = engine.sampler.generate(PROMPTS, replace(SAMPLING, temperature=MIN_TEMPERATURE))
    assert trainer_gap(engine.before, PROMPTS, low, MIN_TEMPERATURE).mean() < 1e-4
    # One completion of each prompt was sampled.
    tokens = sum(group[0].length for group in groups)
    assert sum(sampled for _, sampled in reports) == tokens
    reported = {row: group for some, _ in reports for row, group in some.items()}
    assert [reported[row] for row in range(len(PROMPTS))] == groups


def test_groups_have_the_order_of_the_prompts_and_progress_adds_up(engine: Engine) -> None:
    lengths = [7, 1, 30, 2, 13, 1]
    reports: list[tuple[Mapping[int, list[Completion]], int]] = []
    prompts = [Prompt([4 + row] * size, "", seed=100 * row) for row, size in enumerate(lengths)]
    config = replace(SAMPLING, n=25)  # more completions than HFSampler generates at a time
    groups = engine.sampler.generate(prompts, config, lambda *numbers: reports.append(numbers))
    assert [len(group) for group in groups] == [config.n] * len(prompts)
    assert trainer_gap(engine.before, prompts, groups).max() < 1e-4
    assert trainer_gap(engine.before, prompts[1:] + prompts[:1], groups).mean() > 0.05
    tokens = sum(one.length for group in groups for one in group)
    finished = {row: group for some, _ in reports for row, group in some.items()}
    assert finished == dict(enumerate(groups))
    assert sum(number for _, number in reports) == tokens
    # Tokens are told as they are sampled. How many a report has depends on the load of the machine,
    # and with a server's answers, which come in any order, also whether a group is finished in it.
    assert len(reports[0][0]) < len(groups)
    assert len([number for _, number in reports if number > 0]) >= 3
    count = len(reports)
    engine.sampler.generate(prompts[:1], SAMPLING)  # without on_progress
    assert len(reports) == count


@ON_A_CPU
def test_many_long_prompts_are_read_with_their_seeds(engine: Engine) -> None:
    """They exceed the token limit of one engine step. On a CPU, no prompt may be read in parts."""
    prompts = [
        Prompt([3 + (row // 15**place) % 15 for place in range(LONG)], "", seed=row)
        for row in range(48)
    ]
    config = replace(SAMPLING, n=1, max_new_tokens=2)
    assert engine.tokens(prompts, config)[-4:] == engine.tokens(prompts[-4:], config)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.0, 0.8)])
def test_first_tokens_follow_the_exact_distribution(
    engine: Engine, temperature: float, top_p: float
) -> None:
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
    # The reported log-probabilities are those of this distribution.
    reported = torch.tensor([one.logprobs[0] for one in group], dtype=torch.double)
    torch.testing.assert_close(reported, exact[sampled].log(), atol=1e-4, rtol=0)


@torch.no_grad()
def next_token_probabilities(
    folder: str, prompt: list[int], temperature: float, top_p: float
) -> Tensor:
    """(V,), computed with plain loops from the model's own logits."""
    logits = load_causal_lm(folder)(torch.tensor([prompt])).logits[0, -1]
    probabilities = (logits.double() / temperature).softmax(-1)
    kept, mass = torch.zeros_like(probabilities), 0.0
    for token in probabilities.argsort(descending=True).tolist():
        if mass < top_p:
            kept[token] = probabilities[token]
            mass += float(probabilities[token])
    return kept / kept.sum()
