"""How many cores this process may use."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def usable_cores(root: Path = Path("/")) -> int:
    """Cores by the process's affinity and, on Linux, by the quotas of its control groups.

    A container with `--cpus 4` on a machine of 64 cores may run on all 64, a sixteenth of the time.

    Args:
        root: Where the system's files are.

    Returns:
        At least 1; a part of a core counts as one.
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min([count or 1, *(-int(-quota // 1) for quota in _quotas(root))]))


def _quotas(root: Path) -> list[float]:
    groups = root / "sys/fs/cgroup"
    found = []
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            top = groups if not controllers else groups / "cpu"
            # Its own group and those around it; inside a container the path may lead nowhere.
            own = top / path.strip("/")
            for folder in [own, *own.parents]:
                if folder == top or top in folder.parents:
                    found += _quota(folder)
    return found


def _quota(folder: Path) -> list[float]:
    with suppress(OSError, ValueError):  # "max": no quota
        quota, period = (folder / "cpu.max").read_text().split()
        return [int(quota) / int(period)]
    with suppress(OSError, ValueError):
        microseconds = int((folder / "cpu.cfs_quota_us").read_text())  # -1: no quota
        of_each = int((folder / "cpu.cfs_period_us").read_text())
        return [microseconds / of_each] if microseconds > 0 else []
    return []
