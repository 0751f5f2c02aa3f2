"""The memory limit of a worker, and whether it was reached."""

from __future__ import annotations

import resource
import sys

_TOLERANCE = 16 * 1024  # KiB: Python allocates memory for small objects in steps of a MiB or more


class MemoryLimit:
    """Limit the memory of this process; does nothing on systems other than Linux.

    Args:
        mib: What the process may allocate in addition to what it has now, in MiB.
    """

    def __init__(self, mib: int) -> None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        self._first = _sizes()
        self._size = mib * 1024
        if self._first:
            limit = (self._first["VmData"] + self._size) * 1024
            hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
            if hard == resource.RLIM_INFINITY or limit < hard:
                resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    def was_reached(self) -> bool:
        """Check whether the process has ever reached the limit.

        Linux reports the peak of the whole address space, not of its data, so files that were
        mapped for a while count as well. They hardly add up to exactly the limit.
        """
        sizes, first = _sizes(), self._first
        if not first:
            return False
        mapped = (sizes["VmSize"] - sizes["VmData"]) - (first["VmSize"] - first["VmData"])
        peak = sizes["VmPeak"] - first["VmSize"] - max(0, mapped)
        return abs(peak - self._size) < _TOLERANCE


def _sizes() -> dict[str, int]:
    """In KiB; empty on systems without /proc."""
    if sys.platform != "linux":
        return {}
    with open("/proc/self/status") as status:
        lines = [line.split() for line in status if line.startswith("Vm")]
    return {words[0].rstrip(":"): int(words[1]) for words in lines}
