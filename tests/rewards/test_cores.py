from pathlib import Path

import pytest

from prl_lightning.rewards.cores import usable_cores


@pytest.fixture(autouse=True)
def sixteen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(16)))


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def test_without_control_groups_the_affinity_counts(tmp_path: Path) -> None:
    assert usable_cores(tmp_path) == 16


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("max 100000", 16), ("400000 100000", 4), ("150000 100000", 2), ("10000 100000", 1)],
)
def test_quota_of_a_container(tmp_path: Path, quota: str, cores: int) -> None:
    write(tmp_path / "proc/self/cgroup", "0::/\n")
    write(tmp_path / "sys/fs/cgroup/cpu.max", quota)
    assert usable_cores(tmp_path) == cores


def test_the_smallest_quota_of_the_groups_around_it_counts(tmp_path: Path) -> None:
    write(tmp_path / "proc/self/cgroup", "0::/slurm/job/step\n")
    write(tmp_path / "sys/fs/cgroup/slurm/job/step/cpu.max", "max 100000")
    write(tmp_path / "sys/fs/cgroup/slurm/job/cpu.max", "300000 100000")
    write(tmp_path / "sys/fs/cgroup/slurm/cpu.max", "800000 100000")
    assert usable_cores(tmp_path) == 3


@pytest.mark.parametrize(("quota", "cores"), [("-1", 16), ("200000", 2)])
def test_quota_of_the_first_version_of_control_groups(
    tmp_path: Path, quota: str, cores: int
) -> None:
    write(tmp_path / "proc/self/cgroup", "5:memory:/docker/a\n4:cpu,cpuacct:/docker/a\n0::/b\n")
    write(tmp_path / "sys/fs/cgroup/cpu/docker/a/cpu.cfs_quota_us", quota)
    write(tmp_path / "sys/fs/cgroup/cpu/docker/a/cpu.cfs_period_us", "100000")
    assert usable_cores(tmp_path) == cores
