"""Runs of several processes: start them, and compare what they have recorded."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from torch import Tensor

from fit_all import fit_all
from tiny_runs import ARITHMETIC, tiny_overrides
from warm import Warm, ranks_of

SUPPORT = Path(__file__).parent
# What started processes import: the helpers here, and this clone's package.
PATHS = os.pathsep.join([str(SUPPORT), str(SUPPORT.parents[1])])
Record = dict[str, Any]


def recorded_run(model: str, folder: Path) -> list[str]:
    """Arguments of a run of three updates with recorded rollouts, which leaves a record."""
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
        "--trainer.callbacks+=recorded.Record",
        f"--trainer.callbacks.file={folder / 'record.pt'}",
    ]


def read(folder: Path) -> Record:
    record: Record = torch.load(folder / "record.pt")
    return record


def environment(**variables: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": PATHS} | variables


def run_all(
    root: Path, ranks: int, runs: dict[str, list[str]], config: Path | None = ARITHMETIC
) -> dict[str, Record]:
    """Command lines of ``fit`` in the same processes, by the name of their folder."""
    first = ["fit"] if config is None else ["fit", f"--config={config}"]
    commands = [[*first, *args] for args in runs.values()]
    code, output = start_on_ranks(ranks, fit_all, commands).finish(timeout=900)
    if code:
        raise subprocess.CalledProcessError(code, "fit_all", output)
    return {name: read(root / name) for name in runs}


def start_on_ranks(number: int, function: Callable[..., Any], *args: Any) -> Warm:
    """Call a function on each rank of a process group."""
    ranks = ranks_of(number, find_free_network_port()) if number > 1 else [{}]
    return Warm(function, args, [environment() | variables for variables in ranks], SUPPORT)


def gap(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Largest difference of two entries, relative to the largest entry of their tensor."""
    assert ours.keys() == theirs.keys()
    return max(
        ((ours[name] - theirs[name]).abs().max() / theirs[name].abs().max()).item()
        for name in theirs
        # Half of an adapter is zero at first, and so is the gradient of the other half.
        if theirs[name].any() or ours[name].any()
    )


def start_two(commands: list[tuple[list[str], dict[str, str]]]) -> None:
    """Run one process a node or task until all have ended well."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", *command], cwd=SUPPORT, env=environment(**variables)
        )
        for command, variables in commands
    ]
    try:
        assert [process.wait(timeout=300) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
