"""The memory limit of a worker, and how much of it is used."""

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
        self._is_set = sys.platform == "linux"
        if not self._is_set:
            return
        self._first = _sizes()
        self._size = mib * 1024
        self._kept = 0
        limit = (self._first["VmData"] + self._size) * 1024
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        if hard == resource.RLIM_INFINITY or limit < hard:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    def is_low(self, is_first: bool) -> bool:
        """Check whether earlier calls have kept more than half of the memory.

        Args:
            is_first: Whether the last call was its function's first one here. What that call keeps
                does not count: the next process would load the same tables and models again.
        """
        if not self._is_set:
            return False
        used = _sizes()["VmData"] - self._first["VmData"]
        if is_first:
            self._kept = used
        return used - self._kept > (self._size - self._kept) / 2

    def was_reached(self) -> bool:
        """Check whether the process has ever reached the limit.

        Linux reports the peak of the whole address space, not of its data, so files that were
        mapped for a while count as well. They hardly add up to exactly the limit.
        """
        if not self._is_set:
            return False
        sizes, first = _sizes(), self._first
        mapped = (sizes["VmSize"] - sizes["VmData"]) - (first["VmSize"] - first["VmData"])
        peak = sizes["VmPeak"] - first["VmSize"] - max(0, mapped)
        return abs(peak - self._size) < _TOLERANCE


def _sizes() -> dict[str, int]:
    """In KiB."""
    with open("/proc/self/status") as status:
        lines = [line.split() for line in status if line.startswith("Vm")]
    return {words[0].rstrip(":"): int(words[1]) for words in lines}
