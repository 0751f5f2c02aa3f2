from pathlib import Path

import pytest

from prl_lightning.rewards.sandbox.cores import usable_cores

pytestmark = pytest.mark.process


@pytest.mark.parametrize(
    ("group", "quotas", "cores"),
    [
        (None, {}, 16),
        ("/", {"": "max 100000"}, 16),
        ("/", {"": "400000 100000"}, 4),
        ("/", {"": "150000 100000"}, 2),
        ("/", {"": "10000 100000"}, 1),
        # Each group limits the groups inside it.
        ("/slurm/job", {"slurm/job": "max 100000", "slurm": "300000 100000"}, 3),
    ],
)
def test_affinity_and_quotas(
    group: str | None,
    quotas: dict[str, str],
    cores: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(16)))
    if group is not None:
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/cgroup").write_text(f"0::{group}\n")
    for folder, quota in quotas.items():
        (tmp_path / "sys/fs/cgroup" / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / "sys/fs/cgroup" / folder / "cpu.max").write_text(quota)
    assert usable_cores(tmp_path) == cores
