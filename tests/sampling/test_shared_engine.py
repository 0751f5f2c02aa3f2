"""Two ranks that share an engine sample and train as one rank with its own engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from prl_lightning.cli import main
from prl_lightning.models.causal_lm import named_weights
from prl_lightning.models.loading import load_policy
from prl_lightning.runs.tables import read_table
from prl_lightning.sampling import VLLMSampler
from prl_lightning.types import Completion
from ranks import gap, read, recorded_run, start_on_ranks
from shared_engine import PROMPTS, SAMPLING, SHARES, work
from tiny_runs import ARITHMETIC, write_prompts

pytestmark = pytest.mark.process

LORA = "--model.lora={r: 4, lora_alpha: 8, target_modules: all-linear}"
# Of two evaluations. The second one finds samples in the cache: rank 0 all of its own.
PROBLEMS = (3, 4)


def fit_of(model: str, folder: Path, ranks: int, strategy: str) -> list[str]:
    return [
        "fit",
        f"--config={ARITHMETIC}",
        *recorded_run(model, folder),
        "--rollout.sampler=VLLMSampler",
        "--rollout.sampler.cache_gib=0.1",
        f"--rollout.sampler.tensor_parallel_size={ranks}",
        "--rollout.max_engine_gap=null",
        "--trainer.max_epochs=2",
        "--trainer.accelerator=cpu",
        f"--trainer.devices={ranks}",
        f"--trainer.strategy={strategy}",
        f"--trainer.accumulate_grad_batches={4 // ranks}",
        LORA,
    ]


def validation_of(model: str, folder: Path, problems: int, ranks: int, strategy: str) -> list[str]:
    fit = fit_of(model, folder, ranks, strategy)
    heldout = write_prompts(folder / f"{problems}.jsonl", problems, seed=1)
    return ["validate", *fit[1:], f"--evaluation.sets={{tiny: {heldout}}}"]


@pytest.fixture(scope="module")
def two_ranks(tied_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with what two ranks have done, all in the same processes."""
    root = tmp_path_factory.mktemp("two_ranks")
    training = fit_of(tied_model, root / "training", 2, "fsdp2")
    validations = [
        validation_of(tied_model, root / "validation", problems, 2, "ddp") for problems in PROBLEMS
    ]
    ranks = start_on_ranks(2, work, tied_model, str(root), [training, *validations])
    code, output = ranks.finish(timeout=600)
    assert code == 0, output
    return root


@pytest.fixture(scope="module")
def one_rank(tied_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("one_rank")
    main(fit_of(tied_model, root / "training", 1, "auto"))
    main(validation_of(tied_model, root / "validation", PROBLEMS[-1], 1, "auto"))
    return root


def sampled(folder: Path) -> list[list[tuple[str, list[int]]]]:
    """Prompts and tokens of each iteration."""
    files = sorted((folder / "run" / "version_0" / "completions").glob("epoch=*.parquet"))
    return [sorted((row["prompt"], row["tokens"]) for row in read_table(file)) for file in files]


def test_training_is_that_of_one_rank(two_ranks: Path, one_rank: Path) -> None:
    """A sharded policy with an adapter: what the engine gets is gathered and merged."""
    ours, theirs = two_ranks / "training", one_rank / "training"
    before, after = sampled(ours)
    assert [before, after] == sampled(theirs)
    assert before != after
    ours_record, theirs_record = read(ours), read(theirs)
    assert gap(ours_record["after"], theirs_record["after"]) < 1e-5
    assert gap(ours_record["after"], ours_record["before"]) > 1e-3
    # Of the second iteration, whose engine has updated weights.
    assert 0 < ours_record["metrics"]["rollout/engine_gap_max"] < 1e-4


def cached(folder: Path) -> dict[str, list[list[int]]]:
    """Tokens of the samples that an evaluation has kept, by the key of their prompt."""
    groups: dict[str, list[list[int]]] = {}
    for file in sorted((folder / "run" / "samples").glob("*/part-*.parquet")):
        for row in read_table(file):
            groups.setdefault(row["prompt"], []).append(row["token_ids"])
    return groups


def test_an_evaluation_samples_what_only_one_of_the_ranks_lacks(
    two_ranks: Path, one_rank: Path
) -> None:
    ours, theirs = cached(two_ranks / "validation"), cached(one_rank / "validation")
    assert len(theirs) == PROBLEMS[-1]
    assert len(ours) == PROBLEMS[-1] + 1  # the padding of the first evaluation
    assert {key: ours[key] for key in theirs} == theirs
    assert all(len(group) == 4 for group in ours.values())


def by_rank(folder: Path, name: str) -> list[Any]:
    return [torch.load(folder / f"samples-{rank}.pt", weights_only=False)[name] for rank in (0, 1)]


def test_each_rank_holds_half_of_every_matrix(two_ranks: Path) -> None:
    layer = ["query, key and value", "output of attention", "gate and up", "down"]
    matrices = ["embeddings", *layer, *layer, "head"]
    assert by_rank(two_ranks, "parts") == 2 * [[0.5 for _ in matrices]]


@pytest.fixture(scope="module")
def alone(tied_model: str) -> list[list[Completion]]:
    sampler = VLLMSampler(cache_gib=0.1)
    sampler.start(tied_model, 128)
    sampler.load_weights(named_weights(load_policy(tied_model)))
    groups = sampler.generate(PROMPTS, SAMPLING)
    sampler.stop()
    return groups


def tokens_of(groups: list[list[Completion]]) -> list[list[list[int]]]:
    return [[completion.token_ids for completion in group] for group in groups]


@pytest.mark.parametrize("name", SHARES)
def test_each_rank_gets_the_completions_of_its_own_prompts(
    two_ranks: Path, alone: list[list[Completion]], name: str
) -> None:
    """Also by the reports of progress, which have the rank's own indices and tokens."""
    for rows, (groups, reported, tokens) in zip(
        SHARES[name], by_rank(two_ranks, name), strict=True
    ):
        expected = [alone[row] for row in rows]
        assert tokens_of(groups) == tokens_of(expected)
        assert reported == dict(enumerate(groups))
        assert tokens == sum(one.length for group in expected for one in group)
        for ours, theirs in zip(sum(groups, []), sum(expected, []), strict=True):
            assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)


def test_a_failed_report_of_one_rank_is_raised_on_both(
    two_ranks: Path, alone: list[list[Completion]]
) -> None:
    """After the sampling, so that neither waits for the other; the engine can go on."""
    first, second = by_rank(two_ranks, "error")
    assert second == "OSError: no space left"
    assert first == f"RuntimeError: rank 1, which shares this engine, failed: {second}"
    for groups in by_rank(two_ranks, "after it"):
        assert tokens_of(groups) == tokens_of(alone[:1])
