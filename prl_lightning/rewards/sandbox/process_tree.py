"""The processes that a process has started: their processor time, and their end.

They are read from Linux' /proc; psutil would read every process of the machine each time. Other
systems have no /proc: there a call always counts as waiting, and only its process group is killed.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress

_TICKS = os.sysconf("SC_CLK_TCK")


def usage(process: int) -> tuple[float, bool]:
    """Measure what a process and its descendants use.

    Args:
        process: Its process id.

    Returns:
        Their processor time in seconds, with that of children that have ended; and whether one of
        their threads is running or ready to run.
    """
    seconds, is_ready = 0.0, False
    for member in [process, *descendants(process)]:
        with suppress(OSError):  # it has just ended
            seconds += sum(map(int, _stat(f"/proc/{member}/stat")[11:15])) / _TICKS
            is_ready |= any(map(_is_ready, _threads(member)))
    return seconds, is_ready


def descendants(process: int) -> list[int]:
    """List the ids of all processes that a process and its descendants have started.

    Args:
        process: Its process id; a process that has ended has no descendants.
    """
    found: list[int] = []
    for child in _children(process):
        found += [child, *descendants(child)]
    return found


def lost_by_forks() -> str:
    """Describe what this process has, and what a fork of it would wait for in vain.

    Returns:
        Threads other than the main one, and whether there is an event loop; empty if neither.
    """
    with suppress(OSError):  # no /proc
        threads = len(_threads(os.getpid())) - 1
        files = [os.readlink(file) for file in os.scandir("/proc/self/fd") if file.is_symlink()]
        loops = ["an event loop"] if any("[eventpoll]" in file for file in files) else []
        return " and ".join([*([f"threads ({threads})"] if threads else []), *loops])
    return ""


def kill_tree(process: int) -> None:
    """Kill a process, its process group, and the descendants that have left the group.

    Args:
        process: Its process id, which is also the id of its group.
    """
    with suppress(OSError):
        os.kill(process, signal.SIGSTOP)  # it must not start others meanwhile
    members = descendants(process)
    with suppress(OSError):
        os.killpg(process, signal.SIGKILL)
    for member in members:
        with suppress(OSError):
            os.kill(member, signal.SIGKILL)


def _is_ready(thread: str) -> bool:
    with suppress(OSError):  # it has just ended
        return _stat(f"{thread}/stat")[0] == b"R"
    return False


def _stat(file: str) -> list[bytes]:
    """The fields of a stat file from the third on, the state: see proc(5)."""
    with open(file, "rb") as stat:
        return stat.read().rpartition(b")")[2].split()


def _threads(process: int) -> list[str]:
    return [f"/proc/{process}/task/{thread}" for thread in os.listdir(f"/proc/{process}/task")]


def _children(process: int) -> list[int]:
    found: list[int] = []
    with suppress(OSError):  # it has just ended
        for thread in _threads(process):
            with open(f"{thread}/children", "rb") as file:
                found += map(int, file.read().split())
    return found
