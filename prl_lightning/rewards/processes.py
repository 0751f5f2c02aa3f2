"""What a process has started: found, added up and ended with it."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

import psutil


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
        with suppress(psutil.Error):
            one = psutil.Process(member)
            with one.oneshot():
                seconds += sum(one.cpu_times()[:4])  # of its own and of children, user and system
                computes |= one.status() == psutil.STATUS_RUNNING
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


def _children(process: int) -> list[int]:
    if sys.platform != "linux":  # where this looks at all processes of the machine
        try:
            return [child.pid for child in psutil.Process(process).children()]
        except psutil.Error:
            return []
    found: list[int] = []
    with suppress(OSError):
        for thread in os.listdir(f"/proc/{process}/task"):
            found += map(int, Path(f"/proc/{process}/task/{thread}/children").read_text().split())
    return found
