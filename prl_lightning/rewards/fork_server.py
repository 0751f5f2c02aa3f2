"""Starting, forking and killing the processes that call reward functions."""

from __future__ import annotations

import os
import signal
import socket
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
import psutil

_START_SECONDS = 300.0


@dataclass(eq=False)
class Worker:
    """A process that calls functions, as the trainer's process sees it.

    Attributes:
        connection: To it.
        process: Its number, and that of its process group.
        index: Of the task that it has.
        started: When it was given that, in seconds of the monotonic clock.
        looked: When it was last looked at.
        seconds: What the task may take.
        is_aside: Whether it goes on beside those that have a core to themselves.
        is_low: Whether its priority has been lowered.
    """

    connection: Connection
    process: int
    index: int = -1
    started: float = 0.0
    looked: float = 0.0
    seconds: float = 0.0
    is_aside: bool = False
    is_low: bool = False
    _used_before: float | None = None

    def begin(self, index: int, seconds: float) -> None:
        """Note that it has been given a task.

        Args:
            index: Of the task.
            seconds: Its limit.
        """
        self.index, self.seconds, self.is_aside, self._used_before = index, seconds, False, None
        self.started = self.looked = time.monotonic()

    def is_stuck(self, seconds: float) -> bool:
        """Whether it waits for something, or has computed for too long and gets a low priority.

        Args:
            seconds: Of a processor's time since this was first asked that are too long.
        """
        self.looked = time.monotonic()
        with suppress(psutil.NoSuchProcess, ProcessLookupError):  # which its connection will tell
            process = psutil.Process(self.process)
            if process.status() != psutil.STATUS_RUNNING:
                return True
            times = process.cpu_times()
            used = times.user + times.system
            if self._used_before is None:
                self._used_before = used
            if used - self._used_before >= seconds:
                os.setpriority(os.PRIO_PGRP, self.process, 19)
                self.is_low = True
        return self.is_low

    def kill(self) -> None:
        """End it, and what it has started."""
        self.connection.close()
        with suppress(ProcessLookupError):
            os.killpg(self.process, signal.SIGKILL)


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
        ours, theirs = socket.socketpair()
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
        """A worker; starts the process where it is not there, or no longer.

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
            raise RuntimeError(
                "the process of the reward functions has ended, with exit code "
                f"{self._process.wait(_START_SECONDS)}: look above for its last words; out of "
                "memory is the usual reason"
            ) from error

    def _fork(self) -> Worker:
        assert self._process is not None
        if not self._is_loaded:
            self._wait_until_loaded()
        ours, theirs = socket.socketpair()
        connection = Connection(ours.detach())
        with theirs:
            send_handle(self._control, theirs.fileno(), self._process.pid)
            worker = Worker(connection, int(self._control.recv_bytes()))
        connection.recv_bytes()  # it leads a process group from here on
        return worker

    def stop(self) -> None:
        """End it; workers that are left end by themselves."""
        if self._process is not None:
            self._control.close()
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
