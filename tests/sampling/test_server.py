"""VLLMServerSampler with a real server on a CPU; for its errors see test_server_errors.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from prl_lightning.sampling import FolderTransfer, SamplingConfig, VLLMSampler, VLLMServerSampler
from sampling.test_protocol import (  # collected here again, with the engine below
    LONG,
    PROMPTS,
    SAMPLING,
    Engine,
    test_a_completion_ends_at_the_first_stop_token_or_at_the_limit,  # noqa: F401
    test_a_completion_ends_with_the_token_that_completes_a_stop_text,  # noqa: F401
    test_completions_depend_on_the_prompts_seed_and_not_on_other_prompts,  # noqa: F401
    test_each_seed_has_other_completions,  # noqa: F401
    test_first_tokens_follow_the_exact_distribution,  # noqa: F401
    test_groups_have_the_order_of_the_prompts_and_progress_adds_up,  # noqa: F401
    test_many_long_prompts_are_read_with_their_seeds,  # noqa: F401
    test_samples_and_logprobs_follow_an_update_and_its_reversal,  # noqa: F401
    test_temperature_0_is_greedy,  # noqa: F401
)
from tiny_runs import fit, metrics_of, tiny_overrides
from vllm_server import vllm_server

pytestmark = pytest.mark.process

MAX_MODEL_LEN = LONG + 56


@pytest.fixture(scope="module")
def url(tied_model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server whose model has a tied head and recommends another distribution."""
    log = tmp_path_factory.mktemp("server") / "log"
    with vllm_server(tied_model, MAX_MODEL_LEN, log) as url:
        yield url


@pytest.fixture(scope="module")
def engine(url: str, tied_model: str, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = tmp_path_factory.mktemp("weights")
    return Engine(VLLMServerSampler(url, FolderTransfer(str(folder))), tied_model)


@pytest.mark.parametrize(
    "config",
    [SAMPLING, replace(SAMPLING, temperature=0.7, top_p=0.8), replace(SAMPLING, temperature=0.0)],
    ids=["all", "nucleus", "greedy"],
)
def test_completions_are_those_of_an_engine_in_this_process(
    engine: Engine, in_process: VLLMSampler, config: SamplingConfig
) -> None:
    ours, theirs = (
        sum(sampler.generate(PROMPTS, config), []) for sampler in (engine.sampler, in_process)
    )
    for one, other in zip(ours, theirs, strict=True):
        assert (one.token_ids, one.finished) == (other.token_ids, other.finished)
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


@pytest.fixture(scope="module")
def in_process(engine: Engine) -> Iterator[VLLMSampler]:
    sampler = VLLMSampler(cache_gib=0.1)
    yield Engine(sampler, engine.folder).sampler
    sampler.stop()


def test_the_temporary_folder_of_the_weights_is_removed(engine: Engine) -> None:
    engine.load(engine.before)
    assert isinstance(engine.sampler, VLLMServerSampler)
    assert isinstance(engine.sampler.transfer, FolderTransfer)
    assert list(Path(engine.sampler.transfer.folder).iterdir()) == []


def test_a_run_trains_and_evaluates_with_it(
    url: str, tied_model: str, tmp_path: Path, engine: Engine
) -> None:
    """The gap is that of the first update's new weights, too; another run's end is noticed."""
    folder = tmp_path / "weights"
    folder.mkdir()
    fit(
        *tiny_overrides(tied_model, tmp_path, sampler="VLLMServerSampler"),
        f"--rollout.sampler.url={url}",
        "--rollout.sampler.transfer=FolderTransfer",
        f"--rollout.sampler.transfer.folder={folder}",
        "--model.optimizer={class_path: torch.optim.SGD, init_args: {lr: 0.5}}",
        "--trainer.max_epochs=3",
    )
    metrics = metrics_of(tmp_path)
    assert len(metrics["rollout/engine_gap"]) == 3
    assert max(metrics["rollout/engine_gap_max"]) < 1e-4
    assert min(metrics["train/grad_norm"]) > 0
    with pytest.raises(RuntimeError, match=r"weight_version='prl-.*'.*start one server for each"):
        engine.sampler.generate(PROMPTS, SAMPLING)
    engine.load(engine.before)
