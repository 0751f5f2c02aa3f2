"""Starting, forking and killing the processes that call reward functions."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.reduction import send_handle
from typing import Any

import cloudpickle

from prl_lightning.rewards.processes import kill_tree, lower_priority, usage
from prl_lightning.rewards.tasks import Task

_START_SECONDS = 300.0
_ANSWER_SECONDS = 60.0  # for what takes milliseconds, on whatever machine
_END_SECONDS = 10.0

# How often a call is looked at: as often as that, and less often the longer it takes.
_LOOK_SECONDS = 0.01
_LOOK_SHARE = 0.1


@dataclass(eq=False)
class Worker:
    """A process that calls functions, as the trainer's process sees it.

    Attributes:
        connection: To it.
        process: Its number, and that of its process group; `None` until it has said it.
        index: Of the task that it has.
        task: That task.
        call: What it has been sent for it.
        deadline: When it is killed, in seconds of the monotonic clock.
        next_look: When to look at it.
        is_aside: Whether it leaves its core to others, since it waits or is low.
        is_low: Whether its priority has been lowered, which cannot be undone.
    """

    connection: Connection
    process: int | None = None
    index: int = -1
    task: Task | None = None
    call: bytes = b""
    deadline: float = 0.0
    next_look: float = 0.0
    is_aside: bool = False
    is_low: bool = False
    _started: float = 0.0
    _used_before: float = 0.0

    def begin(self, index: int, task: Task) -> None:
        """Note that it has been given a task; its time begins once the process is there.

        Args:
            index: Of the task.
            task: To carry out.
        """
        self.index, self.task, self.is_aside = index, task, False
        self._start_clock()

    def meet(self) -> None:
        """Read the first words of a new process.

        Raises:
            EOFError: If it has ended.
            OSError: Likewise.
        """
        self.process = int(self.connection.recv_bytes())
        self._start_clock()

    def look(self, patience: float, has_room: bool) -> None:
        """See whether it leaves its core to others, and make it do so where it has taken too long.

        Args:
            patience: Seconds of a core that its call may take before.
            has_room: Whether one more may go on beside those that have a core.
        """
        now = time.monotonic()
        self.next_look = now + max(_LOOK_SECONDS, _LOOK_SHARE * (now - self._started))
        if self.process is None or self.is_low:
            return
        used, computes = usage(self.process)
        is_late = used - self._used_before >= patience
        if computes and is_late and (has_room or self.is_aside):
            lower_priority(self.process)
            self.is_low = True
        self.is_aside = self.is_low or (not computes and (has_room or self.is_aside))

    def kill(self) -> None:
        """End it, and what it has started."""
        with suppress(EOFError, OSError):
            if self.process is None and self.connection.poll():
                self.meet()
        self.connection.close()  # which ends one that has not said its number yet
        if self.process is not None:
            kill_tree(self.process)

    def _start_clock(self) -> None:
        self._started = time.monotonic()
        self._used_before = usage(self.process)[0] if self.process else 0.0
        self.next_look = self._started + _LOOK_SECONDS
        seconds = self.task.seconds if self.task and self.process else _ANSWER_SECONDS
        self.deadline = self._started + seconds


class ForkServer:
    """The process that workers are forked from, as the trainer's process sees it.

    Args:
        functions: What it loads.
        memory_mib: What each worker may take beyond that.
    """

    def __init__(self, functions: Sequence[Any], memory_mib: int) -> None:
        self.functions = functions
        self.memory_mib = memory_mib
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and do not wait until it has loaded the functions.

        Raises:
            TypeError: If a function cannot be sent to another process.
        """
        self.stop()
        try:
            load = cloudpickle.dumps((list(self.functions), self.memory_mib))
        except Exception as error:
            raise TypeError(
                f"the reward functions cannot be sent to a process of their own ({error}): define "
                "them in a module, without what belongs to this process, or set limits.workers=0"
            ) from error
        ours, theirs = _pair(_START_SECONDS)
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        environment.setdefault("OMP_NUM_THREADS", "1")  # there is a worker a core
        self._process = subprocess.Popen(
            [sys.executable, "-m", "prl_lightning.rewards.worker_process", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=environment,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the trainer, which then ends it
        )
        theirs.close()
        self._control = Connection(ours.detach())
        self._is_loaded = False
        self._control.send_bytes(load)

    def fork(self) -> Worker:
        """Ask for a worker, and do not wait for it; it can be given its task already.

        Starts the process where it is not there, or no longer.

        Raises:
            TypeError: See `start`.
            RuntimeError: If the functions cannot be loaded, or the process ends again and again.
        """
        if self._process is not None:
            with suppress(EOFError, OSError):  # somebody has killed it: once is no habit
                return self._fork()
        self.start()
        assert self._process is not None
        try:
            return self._fork()
        except (EOFError, OSError) as error:
            self._process.kill()  # if it lives, it does not answer
            raise RuntimeError(
                "the process of the reward functions has ended, with exit code "
                f"{self._process.wait()}: look above for its last words; out of memory is the "
                "usual reason"
            ) from error

    def repeat(self, call: bytes) -> None:
        """Let the process repeat a call, so that later workers begin with the tables for it.

        Args:
            call: As a worker is given it; one that came to an end soon.
        """
        with suppress(OSError):  # the next worker that is asked for will tell
            self._control.send_bytes(call)

    def _fork(self) -> Worker:
        assert self._process is not None
        if not self._is_loaded:
            self._wait_until_loaded()
        ours, theirs = _pair(_ANSWER_SECONDS)
        worker = Worker(Connection(ours.detach()))
        with theirs:
            self._control.send_bytes(b"")
            send_handle(self._control, theirs.fileno(), self._process.pid)
        return worker

    def stop(self) -> None:
        """End it, and with it the workers that are left and all that they have started."""
        if self._process is None:
            return
        self._control.close()
        try:
            self._process.wait(_END_SECONDS if self._is_loaded else 0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def _wait_until_loaded(self) -> None:
        if not self._control.poll(_START_SECONDS):
            raise RuntimeError(f"the reward functions were not loaded within {_START_SECONDS:g} s")
        trouble = self._control.recv_bytes().decode()
        if trouble:
            raise RuntimeError(f"the reward functions cannot be loaded in a process:\n{trouble}")
        self._is_loaded = True


def _pair(seconds: float) -> tuple[socket.socket, socket.socket]:
    """Sockets to and from another process; what is not sent within so long is an `OSError`."""
    ours, theirs = socket.socketpair()
    limit = struct.pack("ll", int(seconds), 0)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
    return ours, theirs
