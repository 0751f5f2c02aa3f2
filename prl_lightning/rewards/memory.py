"""The memory that a worker may take, and what it has taken."""

from __future__ import annotations

import resource
import sys

_NEARLY = 16 * 1024  # KiB; Python takes memory for small objects by the MiB, and at times by more


class Allowance:
    """Limit the memory of this process, and say what a call has left of it.

    Args:
        mib: What it may take beyond what it has already; without effect on other systems than
            Linux.
    """

    def __init__(self, mib: int) -> None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        self._is_limited = sys.platform == "linux"
        if not self._is_limited:
            return
        self._first = _sizes()
        self._size = mib * 1024
        self._kept = 0
        limit = (self._first["VmData"] + self._size) * 1024
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        if hard == resource.RLIM_INFINITY or limit < hard:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    def is_low(self, is_first: bool) -> bool:
        """Whether calls have left so much behind that others will not find enough.

        Args:
            is_first: Whether this was the function's first call here. What that leaves behind is
                not held against it: tables and models that it loads when they are needed, and
                would load again in the next process.
        """
        if not self._is_limited:
            return False
        used = _sizes()["VmData"] - self._first["VmData"]
        if is_first:
            self._kept = used
        return used - self._kept > (self._size - self._kept) / 2

    def was_used_up(self) -> bool:
        """Whether the most that was taken at a time came to the limit.

        Linux tells the largest size of a process, not of its data: files that were mapped for a
        while count too. They hardly come to just this limit.
        """
        if not self._is_limited:
            return False
        sizes = _sizes()
        others = (sizes["VmSize"] - sizes["VmData"]) - (
            self._first["VmSize"] - self._first["VmData"]
        )
        taken = sizes["VmPeak"] - self._first["VmSize"] - max(0, others)
        return abs(taken - self._size) < _NEARLY


def _sizes() -> dict[str, int]:
    """In KiB."""
    with open("/proc/self/status") as status:
        lines = [line.split() for line in status if line.startswith("Vm")]
    return {words[0].rstrip(":"): int(words[1]) for words in lines}
