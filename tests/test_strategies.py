"""Two ranks do what one does: real processes, the same prompts, recorded rollouts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from runs import QUICKSTART, fit, tiny_overrides

TESTS = Path(__file__).parent
Record = dict[str, Any]

# What differs from the quickstart in each comparison; the split into micro-batches changes as well.
OBJECTIVES = {
    "token_mean": ["--model.objective.aggregation=token_mean"],
    "sequence_mean": ["--model.objective.aggregation=sequence_mean"],
    "constant": [
        "--model.objective.aggregation=constant",
        "--model.objective.max_length=8",
    ],
    "kl_in_loss": ["--model.objective.kl=loss"],
    "kl_in_reward": ["--model.objective.kl=reward_trajectory"],
    "old_logprobs": [
        "--data.updates_per_epoch=3",
        "--data.prompts_per_epoch=12",
        "--trainer.max_epochs=1",
        "--trainer.check_val_every_n_epoch=1",
    ],
    "lora": ["--model.lora={r: 4, lora_alpha: 8, target_modules: all-linear}"],
    "checkpointing": ["--model.gradient_checkpointing=true"],
}
# Rounding is of the size of bfloat16's here, which knows 1 and 1.0078 and nothing between.
HALF_PRECISION = {
    "bf16_mixed": ["--trainer.precision=bf16-mixed"],
    "bf16_true": ["--trainer.precision=bf16-true"],
}
RUNS = OBJECTIVES | HALF_PRECISION
# Measured by each rank for itself: times, and the first completions that it has sampled.
OF_A_RANK = ("seconds", "per_second", "engine_gap", "engine_gap_max")
STRATEGIES = ("ddp", "fsdp2")
SPLITS = {"ddp": 4, "fsdp2": 2}


def overrides(model: str, folder: Path, objective: str) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    return [
        *tiny_overrides(model, folder, sampler="recorded.RecordedSampler"),
        "--model.objective.beta=0.5",
        # Linear in the gradient: Adam would blow rounding up where an entry of it is almost zero.
        "--model.optimizer={class_path: torch.optim.SGD, init_args: {lr: 0.5, momentum: 0.9}}",
        "--rollout.max_engine_gap=1000",
        "--trainer.max_epochs=3",
        "--trainer.check_val_every_n_epoch=3",
        "--trainer.limit_val_batches=1.0",
        "--trainer.num_sanity_val_steps=0",
        "--trainer.accelerator=cpu",
        "--trainer.callbacks+=recorded.Record",
        f"--trainer.callbacks.file={folder / 'record.pt'}",
        *RUNS[objective],
    ]


def read(folder: Path) -> Record:
    record: Record = torch.load(folder / "record.pt")
    return record


@pytest.fixture(scope="module")
def two_ranks(tied_model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Record]:
    """Every objective under every strategy on two ranks, by "strategy/objective"."""
    root = tmp_path_factory.mktemp("two_ranks")
    runs = [
        [
            "fit",
            f"--config={QUICKSTART}",
            *overrides(tied_model, root / strategy / objective, objective),
            f"--trainer.strategy={strategy}",
            "--trainer.devices=2",
            f"--trainer.accumulate_grad_batches={SPLITS[strategy]}",
        ]
        for strategy in STRATEGIES
        for objective in RUNS
    ]
    (root / "runs.json").write_text(json.dumps(runs))
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "fit_all.py"]
    subprocess.run(
        [sys.executable, "-m", *command, str(root / "runs.json")],
        cwd=TESTS,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)},
        timeout=300,
        check=True,
    )
    return {f"{s}/{o}": read(root / s / o) for s in STRATEGIES for o in RUNS}


@pytest.fixture(scope="module")
def one_rank(tied_model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Record]:
    root = tmp_path_factory.mktemp("one_rank")
    for objective in RUNS:
        fit(*overrides(tied_model, root / objective, objective), "--trainer.devices=1")
    return {objective: read(root / objective) for objective in RUNS}


def gap(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Largest difference of two entries, relative to the largest entry of their tensor."""
    assert ours.keys() == theirs.keys()
    return max(
        ((ours[name] - theirs[name]).abs().max() / theirs[name].abs().max()).item()
        for name in theirs
        # Half of an adapter is zero at first, and so is the gradient of the other half.
        if theirs[name].any() or ours[name].any()
    )


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradient_and_parameters_are_those_of_one_rank(
    one_rank: dict[str, Record], two_ranks: dict[str, Record], strategy: str, objective: str
) -> None:
    ours, theirs = two_ranks[f"{strategy}/{objective}"], one_rank[objective]
    gradient = gap(ours["gradient"], theirs["gradient"])
    parameters = gap(ours["after"], theirs["after"])
    print(f"{strategy}/{objective}: gradient {gradient:.1e}, parameters {parameters:.1e}")
    assert gradient < 1e-5
    assert parameters < 1e-5
    # What the engine is sent is what was trained, and training has changed it.
    assert gap(ours["sent"], theirs["sent"]) < 1e-5
    assert all((ours["after"][name] != ours["before"][name]).any() for name in ours["after"])


@pytest.mark.parametrize("precision", HALF_PRECISION)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_half_precision_trains_as_on_one_rank(
    one_rank: dict[str, Record], two_ranks: dict[str, Record], strategy: str, precision: str
) -> None:
    ours, theirs = two_ranks[f"{strategy}/{precision}"], one_rank[precision]
    dtype = torch.float32 if precision == "bf16_mixed" else torch.bfloat16
    assert {tensor.dtype for tensor in ours["after"].values()} == {dtype}
    assert gap(ours["gradient"], theirs["gradient"]) < 0.05
    exact = one_rank["token_mean"]["gradient"]
    assert 1e-5 < gap(ours["gradient"], exact) < 0.1


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_metrics_are_those_of_one_rank(
    one_rank: dict[str, Record], two_ranks: dict[str, Record], strategy: str, objective: str
) -> None:
    """Five evaluation prompts, which two ranks do not divide; none is lost or counted twice."""
    ours, theirs = two_ranks[f"{strategy}/{objective}"]["metrics"], one_rank[objective]["metrics"]
    assert ours.keys() == theirs.keys()
    exact = ("val/", "rollout/tokens", "rollout/completion_length", "rollout/cut", "rollout/groups")
    for name in theirs:
        if not name.endswith(OF_A_RANK):
            rel = 0 if name.startswith(exact) else 1e-4
            assert ours[name] == pytest.approx(theirs[name], rel=rel, abs=0.1 * rel), name
    assert 0 < theirs["val/tiny/mean@4"] < theirs["val/tiny/pass@2"] < 1
