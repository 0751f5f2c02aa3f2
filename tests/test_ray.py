"""The program of docs/clusters.md, with two workers on a CPU."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from ranks import environment
from tiny_runs import ARITHMETIC, fit, metrics_of, tiny_overrides

pytest.importorskip("ray", reason="pip install 'ray[train]'")

pytestmark = [pytest.mark.process, pytest.mark.slow]

PAGE = Path(__file__).parents[1] / "docs" / "clusters.md"


def test_two_workers_do_what_one_process_does(tied_model: str, tmp_path: Path) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
    fit(*tiny_overrides(tied_model, one))
    strategy = ["--trainer.strategy=fsdp2", "--trainer.devices=2", "--trainer.accelerator=cpu"]
    arguments = [f"--config={ARITHMETIC}", *tiny_overrides(tied_model, two), *strategy]
    changes = {
        r"arguments = \[.*\]": f"arguments = {arguments!r}",
        r"num_workers=8, use_gpu=True": "num_workers=2",
    }
    for old, new in changes.items():
        program, count = re.subn(old, lambda _, new=new: new, program)
        assert count == 1, old
    # The workers find this clone's package; no dashboard listens.
    start = "import ray\nray.init(num_cpus=3, include_dashboard=False)\n"
    (tmp_path / "program.py").write_text(start + program)
    command = [sys.executable, tmp_path / "program.py"]
    subprocess.run(command, cwd=tmp_path, env=environment(RAY_USAGE_STATS_ENABLED="0"), check=True)
    expected, found = metrics_of(one), metrics_of(two)
    for name in ("rollout/reward", "train/loss", "train/grad_norm", "val/tiny/mean@4"):
        assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name
