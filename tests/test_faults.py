"""Whatever breaks: one clear error, a checkpoint to go on from, and no rank left waiting."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from prl_lightning.checks.contradictions import ConfigurationError
from prl_lightning.rewards import RewardSum
from prl_lightning.sampling import HFSampler
from ranks import SUPPORT, environment
from tiny_runs import ARITHMETIC, fit, metrics_of, tiny_overrides

pytestmark = pytest.mark.process

FAULTS = {
    "memory": "FaultySampler failed on 4 prompts x 4.*MemoryError: 16 GiB wanted",
    "no group": "12 completions in 3 groups.*asked for 4 groups of 4",
    "one short": "15 completions in 4 groups",
    "empty": "completion of 0 tokens.*The prompt was '",
    "truncated": "1 tokens with 1 log-probabilities, finished=False, for max_new_tokens=8",
    "no log-probability": r"completion of (\d) tokens with \d log-prob.*incomplete",
    "mask too long": r"completion of (\d) tokens with \1 log-prob.*incomplete",
}


def faulty(fault: str, rank: int | None = None) -> list[str]:
    init = json.dumps({"fault": fault, "rank": rank})
    return [f"--rollout.sampler={{class_path: faulty.FaultySampler, init_args: {init}}}"]


def run_of(model: str, folder: Path) -> list[str]:
    """Three iterations with a checkpoint after each, and nothing sampled for evaluation."""
    folder.mkdir(exist_ok=True)
    return [
        *tiny_overrides(model, folder),
        "--trainer.max_epochs=4",
        "--trainer.limit_val_batches=0",
        "--trainer.num_sanity_val_steps=0",
        "--trainer.callbacks=[{class_path: prl_lightning.callbacks.LastCheckpoint, "
        "init_args: {every_n_epochs: 1}}]",
    ]


def parameters(folder: Path) -> dict[str, torch.Tensor]:
    last = max(folder.rglob("last.ckpt"), key=lambda file: file.stat().st_mtime_ns)
    state: dict[str, torch.Tensor] = torch.load(last, weights_only=True)["state_dict"]
    return state


@pytest.fixture(scope="module")
def undisturbed(
    tied_model: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("undisturbed")
    fit(*run_of(tied_model, folder))
    return parameters(folder)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_engine_is_one_clear_error_and_the_run_goes_on_from_before(
    fault: str, undisturbed: dict[str, torch.Tensor], tied_model: str, tmp_path: Path
) -> None:
    with pytest.raises(RuntimeError, match=f"(?s){FAULTS[fault]}"):
        fit(*run_of(tied_model, tmp_path), *faulty(fault))
    assert (tmp_path / "run" / "version_0" / "checkpoints" / "last.ckpt").is_file()
    fit(*run_of(tied_model, tmp_path), "--ckpt_path=last")
    found = parameters(tmp_path)
    assert all(torch.equal(found[name], weight) for name, weight in undisturbed.items())


@pytest.mark.parametrize(
    ("rank", "launcher", "fault"),
    [
        (1, "lightning", "kill"),
        pytest.param(0, "lightning", "memory", marks=pytest.mark.slow),
        pytest.param(1, "torchrun", "memory", marks=pytest.mark.slow),
        pytest.param(0, "lightning", "kill", marks=pytest.mark.slow),
        pytest.param(1, "lightning", "memory", marks=pytest.mark.slow),
        pytest.param(0, "torchrun", "kill", marks=pytest.mark.slow),
        pytest.param(1, "torchrun", "kill", marks=pytest.mark.slow),
        pytest.param(0, "torchrun", "memory", marks=pytest.mark.slow),
    ],
)
def test_one_ranks_failure_ends_all_ranks(
    rank: int, launcher: str, fault: str, tied_model: str, tmp_path: Path
) -> None:
    """Within a minute, where the others wait for it in a collective."""
    starts = {
        "lightning": ["prl_lightning"],
        "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node=2",
                     "-m", "prl_lightning"],
    }  # fmt: skip
    command = [sys.executable, "-m", *starts[launcher], "fit", f"--config={ARITHMETIC}"]
    two = ["--trainer.strategy=ddp", "--trainer.devices=2", "--trainer.accelerator=cpu"]
    started = time.monotonic()
    run = subprocess.Popen(
        [*command, *run_of(tied_model, tmp_path / "run"), *two, *faulty(fault, rank)],
        cwd=SUPPORT,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    last = tmp_path / "run" / "run" / "version_0" / "checkpoints" / "last.ckpt"
    _, words = run.communicate(timeout=300)
    ended = time.monotonic()
    assert run.returncode != 0
    # Its second iteration's checkpoint is the last thing that went well.
    since_failure = min(ended - started, time.time() - last.stat().st_mtime)
    assert since_failure < 60
    if fault == "memory":
        assert "FaultySampler failed" in words
    assert not processes_of(str(tmp_path))


def processes_of(argument: str) -> list[str]:
    """Command lines with it that are still there."""
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    return [line for line in listed.stdout.splitlines() if argument in line]


class LoseData(Callback):
    """Take the training file away while the run is under way."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: object
    ) -> None:
        file = Path(trainer.datamodule.train_sources[0].path)  # type: ignore[attr-defined]
        if trainer.current_epoch == 0:
            file.unlink(missing_ok=True)
        else:
            file.write_text("this is no JSON")


def test_a_file_that_vanishes_or_changes_does_not_touch_a_run_under_way(
    tied_model: str, tmp_path: Path
) -> None:
    fit(*run_of(tied_model, tmp_path), f"--trainer.callbacks+={__name__}.LoseData")
    assert len(metrics_of(tmp_path)["train/loss"]) == 4


FULL_DISK = """
import resource, signal, sys
from prl_lightning.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
size = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
main(sys.argv[2:])
"""


def test_a_full_disk_leaves_the_last_whole_checkpoint(tied_model: str, tmp_path: Path) -> None:
    """No file may grow beyond half a checkpoint; nothing half-written is left."""
    fit(*run_of(tied_model, tmp_path), "--trainer.max_epochs=1")
    before = parameters(tmp_path)
    (whole,) = tmp_path.rglob("last.ckpt")
    script = tmp_path / "full.py"
    script.write_text(FULL_DISK)
    args = ["fit", f"--config={ARITHMETIC}", *run_of(tied_model, tmp_path), "--ckpt_path=last"]
    done = subprocess.run(
        [sys.executable, str(script), str(whole.stat().st_size // 2), *args],
        cwd=SUPPORT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode != 0
    assert "File too large" in done.stderr
    left = [path for path in tmp_path.rglob("*.ckpt*") if path.is_file()]
    assert left == [whole]
    after = parameters(tmp_path)
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_an_unwritable_folder_stops_the_run_before_anything_is_sampled(
    tied_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file lies where the folder should be: root may write where others may not."""
    sampled: list[int] = []
    monkeypatch.setattr(
        HFSampler, "generate", lambda self, prompts, *rest: sampled.append(len(prompts))
    )
    run = run_of(tied_model, tmp_path)
    (tmp_path / "run").write_text("not a folder")
    with pytest.raises(ConfigurationError, match=f"{tmp_path / 'run'} cannot be written"):
        fit(*run)
    assert not sampled


class Broken(HFSampler):
    """An engine that fails in one of its parts."""

    def __init__(self, part: str) -> None:
        super().__init__()
        self.part = part

    def start(self, model: str, max_model_tokens: int) -> None:
        super().start(model, max_model_tokens)
        self.fail("start")

    def load_weights(self, weights: Any) -> None:
        super().load_weights(weights)
        self.fail("load_weights")

    def stop(self) -> None:
        super().stop()
        self.fail("stop")

    def fail(self, part: str) -> None:
        if part == self.part:
            raise MemoryError(f"in {part}")


def broken(part: str) -> list[str]:
    path = f"{__name__}.Broken"
    return [f"--rollout.sampler={{class_path: {path}, init_args: {{part: {part}}}}}"]


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("start", r"Broken did not start for .*: MemoryError: in start"),
        ("load_weights", r"Broken did not take the weights of update 0: MemoryError: in load_we"),
    ],
)
def test_an_engine_that_does_not_begin_is_one_clear_error(
    part: str, message: str, tied_model: str, tmp_path: Path
) -> None:
    with pytest.raises(RuntimeError, match=message):
        fit(*run_of(tied_model, tmp_path), *broken(part))


def test_an_engine_that_does_not_stop_leaves_no_processes_of_rewards(
    tied_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped: list[bool] = []
    stop = RewardSum.stop

    def noted(self: RewardSum) -> None:
        stopped.append(True)
        stop(self)

    monkeypatch.setattr(RewardSum, "stop", noted)
    with pytest.raises(MemoryError, match="in stop"):
        fit(*run_of(tied_model, tmp_path), *broken("stop"), "--trainer.max_epochs=1")
    assert stopped
