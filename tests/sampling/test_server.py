"""VLLMServerSampler with a real server on a CPU; for a fake see test_server_*.py."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest

from architectures import tiny
from prl_lightning.arithmetic import make_tokenizer
from prl_lightning.sampling import FolderTransfer, SamplingConfig, VLLMSampler, VLLMServerSampler
from ranks import start_on_ranks
from sampling.test_architectures import LONGEST, QUICK, gaps
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
from stop_all import stop_all
from tiny_runs import ARITHMETIC, metrics_of, tiny_overrides
from vllm_server import vllm_server

pytestmark = pytest.mark.process

MAX_MODEL_LEN = LONG + 56


class Ranks(NamedTuple):
    root: Path
    endings: list[list[str]]  # of each rank
    output: str


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


@pytest.fixture(scope="module")
def ranks(url: str, engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """Runs in the same two processes, which share the server; the last one's weights fail."""
    root = tmp_path_factory.mktemp("ranks")
    shared = f"{{class_path: FolderTransfer, init_args: {{folder: {root}}}}}"
    runs = {
        "trains": [f"--rollout.sampler.transfer={shared}"],
        "overlaps": [
            f"--rollout.sampler.transfer={shared}",
            *("--rollout.overlap=true", "--rollout.max_staleness=2", "--trainer.max_epochs=5"),
            "--trainer.limit_val_batches=0",  # an evaluation would leave the server idle
        ],
        "breaks": ["--rollout.sampler.transfer=broken_transfer.BrokenTransfer"],
    }
    commands = []
    for name, options in runs.items():
        (root / name).mkdir()
        commands.append(
            [
                *("fit", f"--config={ARITHMETIC}"),
                *tiny_overrides(engine.folder, root / name, sampler="VLLMServerSampler"),
                f"--rollout.sampler.url={url}",
                "--model.optimizer={class_path: torch.optim.SGD, init_args: {lr: 0.5}}",
                "--trainer.max_epochs=3",
                *options,
                *("--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=fsdp2"),
            ]
        )
    code, output = start_on_ranks(2, stop_all, commands, str(root)).finish(timeout=900)
    assert code == 0, output
    endings = [json.loads((root / f"endings.{rank}").read_text()) for rank in (0, 1)]
    return Ranks(root, endings, output)


def test_two_ranks_train_and_evaluate_with_one_server(ranks: Ranks) -> None:
    """The engine has the weights of each update, gathered from both ranks, with the tied head."""
    assert [of_rank[0] for of_rank in ranks.endings] == ["completed"] * 2, ranks.output
    metrics = metrics_of(ranks.root / "trains")
    assert len(metrics["rollout/engine_gap"]) == 3
    assert max(metrics["rollout/engine_gap_max"]) < 1e-4
    assert min(metrics["train/grad_norm"]) > 0


def test_the_server_samples_while_both_ranks_train(ranks: Ranks) -> None:
    """New weights wait until both ranks have sampled with the old ones.

    The version of the weights is compared before and after each sampling. The last two iterations
    have weights that a thread has loaded.
    """
    assert [of_rank[1] for of_rank in ranks.endings] == ["completed"] * 2, ranks.output
    metrics = metrics_of(ranks.root / "overlaps")
    assert metrics["rollout/staleness"] == [0, 1, 2, 2, 2]
    assert max(metrics["rollout/engine_gap_max"]) < 1e-4


def test_weights_that_fail_on_the_first_rank_end_both(ranks: Ranks) -> None:
    for of_rank in ranks.endings:
        assert "did not take the weights of update 0: ServerError: no_room_left" in of_rank[2]


def test_weights_of_another_run_are_noticed(engine: Engine, ranks: Ranks) -> None:
    with pytest.raises(RuntimeError, match=r"weight_version='prl-.*one server for each run"):
        engine.sampler.generate(PROMPTS, SAMPLING)
    engine.load(engine.before)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*QUICK, "qwen3_moe"])
def test_architectures(name: str, tmp_path: Path) -> None:
    """Gemma 2 has no output head of its own; vLLM runs transformers' implementation of OLMo 2."""
    folder = tmp_path / "model"
    tiny(name).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)  # a server does not start without one
    with vllm_server(str(folder), LONGEST, tmp_path / "log") as url:
        sampler = VLLMServerSampler(url, FolderTransfer(str(tmp_path)))
        if name == "qwen3_moe":
            (message,) = sampler.missing_requirements()
            assert "mixture of experts without a GPU" in message
        else:
            assert max(gaps(name, sampler, folder)) < 1e-4
