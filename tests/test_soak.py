"""A long run takes at its end what it took at its beginning."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ranks import SUPPORT, environment
from tiny_runs import ARITHMETIC, metrics_of, tiny_overrides

pytestmark = pytest.mark.process

EPOCHS = 300
SETTLED = 100  # caches are full and every path has been taken


@pytest.mark.slow
def test_300_epochs_with_the_engine_take_no_more_and_no_longer(
    tied_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Evaluations, checkpoints, completion files and rewards that hang among them."""
    overrides = [
        *tiny_overrides(tied_model, tmp_path, sampler="VLLMSampler"),
        "--rollout.sampler.cache_gib=0.1",
        "--rollout.rewards=[prl_lightning.rewards.MathReward, sample_rewards.hangs_at_times]",
        "--rollout.limits={seconds: 0.5, max_failures: 1.0}",
        f"--trainer.max_epochs={EPOCHS}",
        "--trainer.check_val_every_n_epoch=25",
        "--trainer.callbacks+=watch.Watch",
        f"--trainer.callbacks.file={tmp_path / 'watch.jsonl'}",
    ]
    command = [sys.executable, "-m", "prl_lightning", "fit", f"--config={ARITHMETIC}", *overrides]
    subprocess.run(command, cwd=SUPPORT, env=environment(), check=True, timeout=1800)
    lines = (tmp_path / "watch.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines][SETTLED:]
    assert len(rows) == EPOCHS - SETTLED

    def slope(name: str) -> float:
        return float(np.polyfit(range(len(rows)), [row[name] for row in rows], 1)[0])

    seconds = np.diff([row["time"] for row in rows])
    first, last = np.median(seconds[:50]), np.median(seconds[-50:])
    names = ("mib", "mib_children", "files", "threads")
    slopes = {name: round(slope(name), 4) for name in names}
    hung = sum(metrics_of(tmp_path)["rollout/reward_failures/hangs_at_times"])
    with capsys.disabled():
        print(f"\nan epoch adds {slopes} to {rows[-1]}; it takes {first:.3f} s first, {last:.3f} s "
              f"last; {hung:.0f} calls of rewards hung")  # fmt: skip
    assert hung > 0  # or the paths that are not to leak were never taken
    assert abs(slope("mib")) < 0.1
    assert abs(slope("mib_children")) < 0.1
    assert abs(slope("files")) < 0.01
    assert abs(slope("threads")) < 0.01
    # The engine is in the process; of the rewards there are a server, workers, and those aside.
    assert max(row["children"] for row in rows) <= 8
    assert last < 1.5 * first
