"""Two ranks do what one does: real processes, the same prompts, recorded rollouts."""

from __future__ import annotations

import json
import subprocess
import sys
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.plugins.environments.lightning import find_free_network_port

from prl_lightning.models.export import export_checkpoint
from prl_lightning.models.loading import load_causal_lm
from prl_lightning.module import PRLModule
from prl_lightning.runs.tables import read_table
from ranks import Record, environment, gap, read, recorded_run, run_all, start_two
from tiny_runs import ARITHMETIC, fit

pytestmark = pytest.mark.process

# What differs in each comparison; the split into micro-batches changes as well.
OBJECTIVES = {
    "token_mean": ["--model.objective.aggregation=token_mean"],
    "sequence_mean": ["--model.objective.aggregation=sequence_mean", "--model.objective.kl=loss"],
    "several_updates": [
        "--model.objective={aggregation: constant, max_length: 8, kl: reward_trajectory}",
        "--data.updates_per_epoch=3",
        "--data.prompts_per_epoch=12",
        "--trainer.max_epochs=1",
        "--trainer.check_val_every_n_epoch=1",
    ],
    # Statistics of the whole iteration, and totals of the completions that are not truncated.
    "whole_batch": [
        "--model.objective={outcome: batch_std, mask_truncated: true, surrogate: gspo}",
        "--model.objective.aggregation=sequence_mean",
    ],
    "lora": ["--model.lora={r: 4, lora_alpha: 8, target_modules: all-linear}"],
    "checkpointing": ["--model.gradient_checkpointing=true"],
    # Fewer micro-batches than there may be: their number depends on a rank's share.
    "by_tokens": ["--data.micro_batch_tokens=60", "--trainer.accumulate_grad_batches=8"],
}
# Rounding is of the size of bfloat16's here, which knows 1 and 1.0078 and nothing between.
HALF_PRECISION = {
    "bf16_mixed": ["--trainer.precision=bf16-mixed"],
    "bf16_true": ["--trainer.precision=bf16-true"],
}
RUNS = OBJECTIVES | HALF_PRECISION
# By strategy: ddp has the model as one rank has it, so it is tried with less.
COMPARED = [
    *(("fsdp2", objective) for objective in OBJECTIVES),
    *(("ddp", objective) for objective in ("token_mean", "several_updates", "lora", "by_tokens")),
    *(("fsdp2_offload", objective) for objective in ("token_mean", "lora")),
]
HALVED = [("ddp", "bf16_mixed"), *(("fsdp2", precision) for precision in HALF_PRECISION)]
# Of each rank alone: times, the first completions that it has sampled, how its share is cut.
OF_A_RANK = ("seconds", "per_second", "engine_gap", "engine_gap_max", "micro_batches")
STRATEGIES = ("ddp", "fsdp2", "fsdp2_offload")
OVERLAYS = ARITHMETIC.parent / "strategies"
SPLITS = {"ddp": 4, "fsdp2": 2, "fsdp2_offload": 2}
# Starts both tasks of a job and fails if one fails, as the real one does.
SRUN = """#!/bin/sh
shift
for task in 0 1; do
  SLURM_PROCID=$task SLURM_LOCALID=$task "$@" & pids="$pids $!"
done
for pid in $pids; do wait "$pid" || exit 1; done
"""


def overrides(model: str, folder: Path, objective: str) -> list[str]:
    return [*recorded_run(model, folder), "--trainer.accelerator=cpu", *RUNS[objective]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two_ranks")


@pytest.fixture(scope="module")
def two_ranks(tied_model: str, root: Path) -> dict[str, Record]:
    """Every objective under every strategy on two ranks, by "strategy/objective"."""
    runs = {
        f"{strategy}/{objective}": [
            *overrides(tied_model, root / strategy / objective, objective),
            f"--config={OVERLAYS / strategy}.yaml",
            f"--trainer.accumulate_grad_batches={SPLITS[strategy]}",
        ]
        for strategy, objective in (*COMPARED, *HALVED)
    }
    return run_all(root, 2, runs)


@pytest.fixture(scope="module")
def one_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("one_rank")


@pytest.fixture(scope="module")
def one_rank(tied_model: str, one_root: Path) -> dict[str, Record]:
    for objective in RUNS:
        fit(*overrides(tied_model, one_root / objective, objective), "--trainer.devices=1")
    return {objective: read(one_root / objective) for objective in RUNS}


@pytest.mark.parametrize(("strategy", "objective"), COMPARED)
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


@pytest.mark.parametrize(("strategy", "precision"), HALVED)
def test_half_precision_trains_as_on_one_rank(
    one_rank: dict[str, Record], two_ranks: dict[str, Record], strategy: str, precision: str
) -> None:
    ours = two_ranks[f"{strategy}/{precision}"]
    # FSDP2 computes with the gathered weights in bfloat16, norms and residual stream as well.
    theirs = one_rank["bf16_true" if strategy == "fsdp2" else precision]
    dtype = torch.float32 if precision == "bf16_mixed" else torch.bfloat16
    assert {tensor.dtype for tensor in ours["after"].values()} == {dtype}
    exact = one_rank["token_mean"]["gradient"]
    assert gap(ours["gradient"], theirs["gradient"]) < 0.05
    assert 1e-5 < gap(ours["gradient"], exact) < 0.1


@pytest.mark.parametrize(("strategy", "objective"), COMPARED)
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


@pytest.fixture(scope="module")
def fsdp1(tied_model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Record]:
    """FSDP1 on two ranks; torch cannot gather its checkpoint on a CPU, so there is none."""
    folder = tmp_path_factory.mktemp("fsdp1")
    runs = {}
    for objective in ("token_mean", "lora", "checkpointing", "bf16_mixed"):
        first = overrides(tied_model, folder / objective, objective)
        place = first.index("--trainer.callbacks+=recorded.Record")
        runs[objective] = [
            *first[:place],
            "--trainer.callbacks=[]",
            *first[place:],
            "--trainer.enable_checkpointing=false",
            "--trainer.devices=2",
            "--trainer.strategy={class_path: fsdp1_on_cpu.FSDP1OnCPU}",
        ]
    return run_all(folder, 2, runs)


@pytest.mark.parametrize("objective", ["token_mean", "lora", "checkpointing"])
def test_fsdp1_does_what_one_rank_does(
    one_rank: dict[str, Record], fsdp1: dict[str, Record], objective: str
) -> None:
    """The gradient is clipped by its norm over all ranks, of which each knows its own part."""
    ours, theirs = fsdp1[objective], one_rank[objective]
    assert gap(ours["sent"], theirs["sent"]) < 1e-5
    assert gap(ours["sent"], ours["sent_before"]) > 1e-3
    for name, value in theirs["metrics"].items():
        if not name.endswith(OF_A_RANK):
            assert ours["metrics"][name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    assert theirs["metrics"]["train/grad_norm"] > 2  # so that it was clipped


def test_fsdp1_computes_in_half_precision_and_keeps_its_weights_whole(
    one_rank: dict[str, Record], fsdp1: dict[str, Record]
) -> None:
    ours, theirs = fsdp1["bf16_mixed"]["sent"], one_rank["token_mean"]["sent"]
    assert {tensor.dtype for tensor in ours.values()} == {torch.float32}
    assert 1e-6 < gap(ours, theirs) < 0.02


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_files_are_those_of_one_rank(
    root: Path, one_root: Path, one_rank: Any, two_ranks: Any, strategy: str
) -> None:
    """Intervals and what a completion's tokens are worth, from the ranks together."""
    ours, theirs = (
        folder / "run" / "version_0"
        for folder in (root / strategy / "token_mean", one_root / "token_mean")
    )
    evaluations = [
        json.loads((run / "evaluations.jsonl").read_text())["sets"]["tiny"]
        for run in (ours, theirs)
    ]
    assert evaluations[0]["problems"] == evaluations[1]["problems"] == 5
    for name, estimate in evaluations[1]["metrics"].items():
        assert evaluations[0]["metrics"][name] == pytest.approx(estimate, rel=1e-12)
        assert estimate[1] < estimate[2]
    name = "completions/epoch=00000.parquet"
    rows = [sorted(read_table(run / name), key=itemgetter("completion")) for run in (ours, theirs)]
    assert [row["group"] for row in read_table(ours / name)] == [
        g for g in range(4) for _ in "four"
    ]
    for our, their in zip(*rows, strict=True):
        for column in ("prompt", "tokens", "reward"):
            assert our[column] == their[column]
        assert our["advantages"] == pytest.approx(their["advantages"], abs=1e-5)


@pytest.mark.parametrize("objective", ["token_mean", "lora"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_checkpoint_of_two_ranks_becomes_a_hugging_face_folder_and_a_module(
    root: Path, two_ranks: dict[str, Record], strategy: str, objective: str, tmp_path: Path
) -> None:
    checkpoints = root / strategy / objective / "run" / "version_0" / "checkpoints"
    assert (checkpoints / "last.ckpt").is_dir() == (strategy != "ddp")
    export_checkpoint(str(checkpoints / "last.ckpt"), str(tmp_path / "out"))
    exported = load_causal_lm(str(tmp_path / "out")).state_dict()
    sent = two_ranks[f"{strategy}/{objective}"]["sent"]
    assert exported.keys() == sent.keys()
    assert all(torch.equal(exported[name], sent[name]) for name in sent)
    loaded = dict(PRLModule.load_from_checkpoint(checkpoints / "last.ckpt").weights())
    assert all(torch.equal(loaded[name], sent[name]) for name in sent)


@pytest.mark.usefixtures("two_ranks")
@pytest.mark.parametrize("strategy", ["fsdp2", "fsdp2_offload"])
def test_a_sharded_checkpoint_of_two_ranks_goes_on_with_one(
    tied_model: str, root: Path, tmp_path: Path, strategy: str
) -> None:
    file = root / strategy / "token_mean" / "run" / "version_0" / "checkpoints" / "last.ckpt"
    four_epochs = ["--trainer.max_epochs=4", "--trainer.devices=1"]
    resumed = run_all(tmp_path, 1, {
        "resumed": [
            *overrides(tied_model, tmp_path / "resumed", "token_mean"),
            f"--config={OVERLAYS / strategy}.yaml",
            *four_epochs,
            f"--ckpt_path={file}",
        ]
    })["resumed"]  # fmt: skip
    fit(*overrides(tied_model, tmp_path / "whole", "token_mean"), *four_epochs)
    whole = read(tmp_path / "whole")
    # Of the optimizer's state as well: momentum has built up over three epochs.
    assert gap(resumed["after"], whole["after"]) < 1e-5
    assert gap(resumed["after"], resumed["before"]) > 1e-3


@pytest.mark.slow  # the script for SLURM has two processes of one device as well
def test_torchrun_on_two_nodes(
    tied_model: str, one_rank: dict[str, Record], tmp_path: Path
) -> None:
    args = [
        *overrides(tied_model, tmp_path, "token_mean"),
        "--trainer.strategy=ddp",
        "--trainer.num_nodes=2",
        "--trainer.devices=1",
    ]
    torchrun = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=static"]
    address = ["--master-addr=127.0.0.1", f"--master-port={find_free_network_port()}"]
    command = ["-m", "prl_lightning", "fit", f"--config={ARITHMETIC}", *args]
    start_two([
        (["torch.distributed.run", *torchrun, *address, f"--node-rank={node}", *command], {})
        for node in range(2)
    ])  # fmt: skip
    assert gap(read(tmp_path)["after"], one_rank["token_mean"]["after"]) < 1e-5


@pytest.mark.example
def test_the_script_for_slurm(tied_model: str, one_rank: dict[str, Record], tmp_path: Path) -> None:
    args = [*overrides(tied_model, tmp_path, "token_mean"), "--trainer.strategy=fsdp2"]
    srun = tmp_path / "bin" / "srun"
    srun.parent.mkdir()
    srun.write_text(SRUN)
    srun.chmod(0o755)
    job = {
        "PATH": f"{srun.parent}:{Path(sys.executable).parent}:/usr/bin:/bin",
        "SLURM_NNODES": "1",
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NAME": "train",
        "SLURM_NODELIST": "localhost",
        "SLURM_NODEID": "0",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "MASTER_PORT": str(find_free_network_port()),
    }
    command = [OVERLAYS / "slurm.sh", f"--config={ARITHMETIC}", *args]
    subprocess.run(command, env=environment(**job), check=True, timeout=600)
    assert gap(read(tmp_path)["after"], one_rank["token_mean"]["after"]) < 1e-5


@pytest.mark.slow  # test_paper_configs has two ranks with engines, and test_shared_engine one
def test_each_rank_has_a_vllm_engine_that_follows_the_policy(
    tied_model: str, tmp_path: Path
) -> None:
    vllm = ["--rollout.sampler=VLLMSampler", "--rollout.sampler.cache_gib=0.1"]
    runs = {
        name: [
            *overrides(tied_model, tmp_path / name, objective),
            *vllm,
            "--rollout.max_engine_gap=null",
            f"--rollout.sampler.dtype={dtype}",
            f"--trainer.strategy={name}",
            "--trainer.devices=2",
        ]
        for name, objective, dtype in (
            ("ddp", "token_mean", "float32"),
            ("fsdp2", "lora", "bfloat16"),
        )
    }
    records = run_all(tmp_path, 2, runs)
    assert records["ddp"]["metrics"]["rollout/engine_gap_max"] < 1e-4
    assert 1e-4 < records["fsdp2"]["metrics"]["rollout/engine_gap"] < 0.05
    for record in records.values():
        assert gap(record["after"], record["before"]) > 1e-3
