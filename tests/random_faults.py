"""Random faults in a run of two ranks, and what became of it.

    python tests/random_faults.py --faults 50

Kills reward workers, the processes they are forked from, the engine's process, a rank or the whole
run (all with SIGKILL), or lets no file grow any more, as on a full disk. A run that ends is
continued with `--ckpt_path last`. At the end its weights are compared with those of a run that was
left alone: an update that was lost, made twice or made with other rewards shows there.
"""

from __future__ import annotations

import argparse
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
from ranks import TESTS, environment
from runs import QUICKSTART, tiny_overrides

STALLED_SECONDS = 180.0
FAULTS = ("worker", "fork server", "engine", "rank", "run", "full disk")


class Run:
    """One run, started again as often as it takes."""

    def __init__(self, model: str, folder: Path, epochs: int) -> None:
        folder.mkdir()
        self.folder = folder
        self.command = [
            *(sys.executable, "-m", "prl_lightning", "fit", f"--config={QUICKSTART}"),
            *tiny_overrides(model, folder),
            "--rollout.sampler={class_path: prl_lightning.samplers.ProcessSampler, "
            "init_args: {sampler: prl_lightning.samplers.HFSampler}}",
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
        self.process = subprocess.Popen(
            self.command,
            cwd=TESTS,
            env=environment(),
            stdout=self.log,
            stderr=self.log,
            start_new_session=True,
        )

    def wait(self, saves: int) -> str:
        """Until so many checkpoints have been written: "on", or "ended", or "hangs"."""
        last = self.saved_at()
        seen = since = time.monotonic()
        while self.process.poll() is None:
            now = time.monotonic()
            if self.saved_at() != last:
                last, since, saves = self.saved_at(), now, saves - 1
            if saves <= 0:
                return "on"
            if now - since > STALLED_SECONDS:
                self.kill()
                return "hangs"
            time.sleep(0.05)
        return "ended" if time.monotonic() - seen < STALLED_SECONDS else "ended late"

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
        children = main.children(recursive=True)
        lines = {child: " ".join(child.cmdline()) for child in children}
        servers = [c for c, line in lines.items() if "worker_process" in line]
        by_fault = {
            "worker": [c for c in servers if c.ppid() in {s.pid for s in servers}],
            "fork server": [c for c in servers if c.ppid() not in {s.pid for s in servers}],
            "engine": [c for c, line in lines.items() if "spawn_main" in line],
            "rank": [c for c, line in lines.items() if "prl_lightning" in line and "fit" in line],
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
    if run.wait(saves=2) == "on":
        return "went on by itself"
    if run.process.returncode == 0:
        return "went on by itself"
    run.start()
    return "continued" if run.wait(saves=1) != "hangs" else "HANGS"


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
        run.start()
        run.wait(saves=1)
        for number, fault in enumerate(faults):
            found = outcome_of(run, fault, draw)
            outcomes[fault, found] += 1
            print(f"{number + 1}/{args.faults} {fault}: {found}", flush=True)
        run.process.wait()
        alone.start()
        alone.process.wait()
        print("\n| fault | outcome | times |\n| --- | --- | --- |")
        for (fault, found), times in sorted(outcomes.items()):
            print(f"| {fault} | {found} | {times} |")
        struck = run.weights()
        different = [n for n, w in alone.weights().items() if not torch.equal(struck[n], w)]
        print(f"\nparameters that differ from those of a run left alone: {len(different)}")


if __name__ == "__main__":
    main()
