"""What a process has started: found, added up and ended with it."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress

import psutil

_TICKS = os.sysconf("SC_CLK_TCK")


def descendants(process: int) -> list[int]:
    """The processes that a process has started, and those that they have.

    Args:
        process: Its number; one that has ended has none.
    """
    found: list[int] = []
    for child in _children(process):
        found += [child, *descendants(child)]
    return found


def usage(process: int) -> tuple[float, bool]:
    """What a process and its descendants use of the cores.

    Args:
        process: Its number.

    Returns:
        The seconds of a core that they have used so far, those of children that have ended
        included; and whether one of them computes at this moment, as all others wait.
    """
    seconds, computes = 0.0, False
    for member in [process, *descendants(process)]:
        with suppress(psutil.Error, OSError):
            used, runs = _usage_of_one(member)
            seconds += used
            computes |= runs
    return seconds, computes


def lower_priority(process: int) -> None:
    """Let a process and its descendants have what the others leave of the cores.

    On Linux that is next to nothing: twenty at the lowest ordinary priority would still take an
    eighth of two cores.

    Args:
        process: Its number.
    """
    for member in [process, *descendants(process)]:
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, member, 19)
            if sys.platform == "linux":
                os.sched_setscheduler(member, os.SCHED_IDLE, os.sched_param(0))


def kill_tree(process: int) -> None:
    """End a process that leads a group: the group, and descendants that have left it.

    Args:
        process: Its number.
    """
    with suppress(OSError):
        os.kill(process, signal.SIGSTOP)  # so that it starts no more
    members = descendants(process)
    with suppress(OSError):
        os.killpg(process, signal.SIGKILL)
    for member in members:
        with suppress(OSError):
            os.kill(member, signal.SIGKILL)


def _usage_of_one(process: int) -> tuple[float, bool]:
    """Its own seconds and those of its children that have ended, in user and system mode."""
    if sys.platform != "linux":
        one = psutil.Process(process)
        return sum(one.cpu_times()[:4]), one.status() == psutil.STATUS_RUNNING
    with open(f"/proc/{process}/stat", "rb") as file:  # psutil takes a millisecond for it
        words = file.read().rpartition(b")")[2].split()  # from the third on: see proc(5)
    return sum(map(int, words[11:15])) / _TICKS, words[0] == b"R"


def _children(process: int) -> list[int]:
    if sys.platform != "linux":  # where this looks at all processes of the machine
        try:
            return [child.pid for child in psutil.Process(process).children()]
        except psutil.Error:
            return []
    found: list[int] = []
    with suppress(OSError):
        for thread in os.listdir(f"/proc/{process}/task"):
            with open(f"/proc/{process}/task/{thread}/children", "rb") as file:
                found += map(int, file.read().split())
    return found
