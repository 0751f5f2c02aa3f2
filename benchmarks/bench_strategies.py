"""Arithmetic under each strategy: what it reaches, and how long an iteration takes.

    python benchmarks/bench_strategies.py            # writes benchmarks/results/strategies.json

Every strategy runs on the same machine, one after the other; on a CPU two ranks share the cores
that one rank has for itself, so the ratio shows what sharing costs and not what more devices win.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from prl_lightning.runs.files import read_metrics
from report import publish

ROOT = Path(__file__).parents[1]
STRATEGIES = {"auto": 1, "ddp": 2, "fsdp2": 2}
PARTS = (
    "rollout/sampling_seconds",
    "rollout/reward_seconds",
    "rollout/scoring_seconds",
    "train/seconds",
)


def run(strategy: str, devices: int, epochs: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "prl_lightning", "fit", "--config=configs/arithmetic.yaml"]
        options = [
            f"--trainer.strategy={strategy}",
            f"--trainer.devices={devices}",
            f"--trainer.max_epochs={epochs}",
            f"--trainer.default_root_dir={folder}/run",
            "--trainer.accelerator=cpu",
        ]
        threads = str(max(1, (os.cpu_count() or 1) // devices))
        env = os.environ | {"OMP_NUM_THREADS": threads}
        subprocess.run([*command, *options], cwd=ROOT, env=env, check=True)
        metrics = read_metrics(Path(folder) / "run" / "version_0" / "metrics.csv")
    values = {name: series for name, (_, series) in metrics.items()}
    # The first iteration starts what is started once.
    epoch = [sum(parts) for parts in zip(*(values[name][1:] for name in PARTS), strict=True)]
    return {
        "devices": devices,
        "mean@16 before": values["val/arithmetic/mean@16"][0],
        "mean@16 after": values["val/arithmetic/mean@16"][-1],
        "seconds an iteration (median)": statistics.median(epoch),
        "engine gap (largest mean)": max(values["rollout/engine_gap"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/strategies.json")
    args = parser.parse_args()
    results = {name: run(name, devices, args.epochs) for name, devices in STRATEGIES.items()}
    alone = results["auto"]["seconds an iteration (median)"]
    for result in results.values():
        result["ratio to one rank"] = result["seconds an iteration (median)"] / alone
    publish({"results": results}, args.out)


if __name__ == "__main__":
    main()
