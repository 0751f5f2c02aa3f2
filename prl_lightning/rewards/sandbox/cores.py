"""The number of cores that this process may use."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from pathlib import Path


def usable_cores(root: Path = Path("/")) -> int:
    """Count cores by the process's affinity and by the CPU quotas of its control groups (v2).

    A container with `--cpus 4` on a machine with 64 cores may run on all 64, a sixteenth of the
    time.

    Args:
        root: Root of the file system.

    Returns:
        At least 1; a fraction of a core counts as one.
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = count or 1
    with suppress(OSError):
        _, _, path = (root / "proc/self/cgroup").read_text().rpartition("::")
        group = root / "sys/fs/cgroup" / path.strip().strip("/")
        for folder in [group, *group.parents]:  # each group limits the groups inside it
            with suppress(OSError, ValueError):  # no quota: there is no file, or it says "max"
                quota, period = map(int, (folder / "cpu.max").read_text().split())
                cores = min(cores, max(1, math.ceil(quota / period)))
    return cores
