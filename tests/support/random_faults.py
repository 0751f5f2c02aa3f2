"""Random faults in a run of two ranks, and what became of it.

    python tests/support/random_faults.py --faults 50

Kills reward workers, the processes they are forked from, the engine's process, either rank or the
whole run (all with SIGKILL), or lets no file grow any more, as on a full disk. A run that ends is
continued with `--ckpt_path last`; one that does not go on, or leaves processes, HANGS. At the
end its weights are compared with those of a run that was left alone: an update that was lost, made
twice or made with other rewards shows there. The table goes to `benchmarks/results`, and the exit
code is 1 where something hung or a parameter differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil
import torch

from conftest import save_tiny_model
from ranks import SUPPORT, environment
from tiny_runs import ARITHMETIC, tiny_overrides

STALLED_SECONDS = 180.0
ENDING_SECONDS = 60.0  # in which nothing of a run that has ended is left
FAULTS = ("worker", "fork server", "engine", "rank 0", "rank 1", "run", "full disk")
RESULTS = SUPPORT.parents[1] / "benchmarks" / "results" / "random_faults.json"


class Run:
    """One run, started again as often as it takes."""

    def __init__(self, model: str, folder: Path, epochs: int) -> None:
        folder.mkdir()
        self.folder = folder
        self.command = [
            *(sys.executable, "-m", "prl_lightning", "fit", f"--config={ARITHMETIC}"),
            *tiny_overrides(model, folder),
            "--rollout.sampler={class_path: prl_lightning.sampling.SubprocessSampler, "
            "init_args: {sampler: prl_lightning.sampling.HFSampler}}",
            "--rollout.rewards=[sample_rewards.takes_its_time]",
            f"--trainer.max_epochs={epochs}",
            "--trainer.limit_val_batches=0",
            "--trainer.num_sanity_val_steps=0",
            "--trainer.callbacks=[{class_path: prl_lightning.callbacks.LastCheckpoint, "
            "init_args: {every_n_epochs: 1}}]",
            *("--trainer.strategy=ddp", "--trainer.devices=2", "--trainer.accelerator=cpu"),
            "--ckpt_path=last",
        ]

    def start(self) -> None:
        self.log = (self.folder / "log").open("a")
        self.others: list[psutil.Process] = []
        self.process = subprocess.Popen(
            self.command,
            cwd=SUPPORT,
            env=environment(),
            stdout=self.log,
            stderr=self.log,
            start_new_session=True,
        )

    def wait(self, saves: int) -> str:
        """Until so many checkpoints have been written: "on", or "ended", or "HANGS"."""
        last, since = self.saved_at(), time.monotonic()
        while self.process.poll() is None:
            if self.saved_at() != last:
                last, since, saves = self.saved_at(), time.monotonic(), saves - 1
            if saves <= 0:
                return "on"
            if time.monotonic() - since > STALLED_SECONDS:
                self.kill()
                return "HANGS"
            time.sleep(0.05)
        _, left = psutil.wait_procs(self.others, timeout=ENDING_SECONDS)
        for process in left:
            process.kill()
        return "HANGS" if left else "ended"

    def saved_at(self) -> int:
        files = self.folder.rglob("last.ckpt")
        return max((file.stat().st_mtime_ns for file in files if file.exists()), default=0)

    def kill(self) -> None:
        for process in psutil.Process(self.process.pid).children(recursive=True):
            process.kill()
        self.process.kill()
        self.process.wait()

    def strike(self, fault: str, draw: random.Random) -> bool:
        """Do it to one of those concerned; False where there is none at the moment."""
        main = psutil.Process(self.process.pid)
        children = self.others = main.children(recursive=True)
        lines = {child: " ".join(child.cmdline()) for child in children}
        servers = [c for c, line in lines.items() if "rewards.sandbox.server" in line]
        by_fault = {
            "worker": [c for c in servers if c.ppid() in {s.pid for s in servers}],
            "fork server": [c for c in servers if c.ppid() not in {s.pid for s in servers}],
            "engine": [c for c, line in lines.items() if "spawn_main" in line],
            "rank 0": [main],
            "rank 1": [c for c, line in lines.items() if "prl_lightning" in line and "fit" in line],
            "run": [main],
            "full disk": [main],
        }
        if not by_fault[fault]:
            return False
        victim = draw.choice(by_fault[fault])
        if fault == "full disk":
            victim.rlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        elif fault == "run":
            self.kill()
        else:
            victim.send_signal(signal.SIGKILL)
        return True

    def weights(self) -> dict[str, torch.Tensor]:
        last = max(self.folder.rglob("last.ckpt"), key=lambda file: file.stat().st_mtime_ns)
        state: dict[str, torch.Tensor] = torch.load(last, weights_only=True)["state_dict"]
        return state


def outcome_of(run: Run, fault: str, draw: random.Random) -> str:
    """Strike and see the run go on, by itself or when it is started again."""
    while not run.strike(fault, draw):
        time.sleep(0.02)
        if run.process.poll() is not None:
            return "was over before"
    found = run.wait(saves=2)
    if found == "on" or (found == "ended" and run.process.returncode == 0):
        return "went on by itself"
    run.start()
    after = run.wait(saves=1)
    if "HANGS" in (found, after):
        return "HANGS"
    return "continued" if after == "on" or run.process.returncode == 0 else "FAILS AGAIN"


def compare(struck: Run, alone: Run) -> int:
    """How many parameters differ."""
    theirs = struck.weights()
    return sum(not torch.equal(theirs[name], own) for name, own in alone.weights().items())


def report(outcomes: Counter[tuple[str, str]], differing: int, seed: int, seconds: float) -> bool:
    """Print and keep the table; False where something is lost, wrong or hangs."""
    table = [
        {"fault": fault, "outcome": found, "times": times}
        for (fault, found), times in sorted(outcomes.items())
    ]
    print("\n| fault | outcome | times |\n| --- | --- | --- |")
    for row in table:
        print(f"| {row['fault']} | {row['outcome']} | {row['times']} |")
    print(f"\nparameters that differ from those of a run left alone: {differing}")
    result = {
        "faults": outcomes.total(),
        "seed": seed,
        "seconds": round(seconds),
        "cores": os.cpu_count(),
        "differing_parameters": differing,
        "outcomes": table,
    }
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")
    bad = {"HANGS", "FAILS AGAIN"} & {found for _, found in outcomes}
    return not bad and differing == 0


def main() -> None:
    parser = argparse.ArgumentParser(description="Random faults in a run of two ranks.")
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    faults = [FAULTS[i % len(FAULTS)] for i in range(args.faults)]
    draw.shuffle(faults)
    with tempfile.TemporaryDirectory() as folder:
        model = save_tiny_model(Path(folder) / "model", tie=True)
        run, alone = (Run(model, Path(folder) / n, 4 * args.faults) for n in ("struck", "alone"))
        outcomes: Counter[tuple[str, str]] = Counter()
        began = time.monotonic()
        run.start()
        run.wait(saves=1)
        for number, fault in enumerate(faults):
            found = outcome_of(run, fault, draw)
            outcomes[fault, found] += 1
            print(f"{number + 1}/{args.faults} {fault}: {found}", flush=True)
        run.process.wait()
        alone.start()
        alone.process.wait()
        is_good = report(outcomes, compare(run, alone), args.seed, time.monotonic() - began)
    sys.exit(0 if is_good else 1)


if __name__ == "__main__":
    main()
