"""The trainer's side of the sandbox: starts the server, sends it calls and reads the replies."""

from __future__ import annotations

import json
import os
import pickle
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

import cloudpickle

from prl_lightning.rewards.sandbox.limits import DIED, Failure, Reply, RewardLimits, Task

_SILENCE_SECONDS = 60.0  # the server sends a sign of life every second
_END_SECONDS = 10.0


class Sandbox:
    """Call functions in processes that are killed if they exceed their limits.

    It uses no signals and no threads, so it works from any thread, one at a time.

    Args:
        functions: The functions. If one has a method `warm_up`, the server calls it once, for slow
            imports and tables.
        limits: Limits of memory and imports.
        workers: Number of processes that run calls.
        called: What messages call the functions.
    """

    def __init__(
        self,
        functions: Sequence[Any],
        limits: RewardLimits,
        workers: int,
        called: str = "reward functions",
    ) -> None:
        self.functions = functions
        self.called = called
        self.limits = limits
        self.workers = workers
        self._server: subprocess.Popen[bytes] | None = None
        self._has_ended_idle = False

    def start(self) -> None:
        """Start the server without waiting until it has loaded the functions.

        Raises:
            TypeError: A function cannot be pickled.
        """
        self.stop()
        try:
            load = cloudpickle.dumps((list(self.functions), self.limits, self.workers))
        except Exception as error:
            raise TypeError(
                f"the {self.called} cannot be sent to another process ({error}): define them in a "
                "module, without objects that belong to this process. Or, for reward functions "
                "alone, set limits.workers=0."
            ) from error
        ours, theirs = socket.socketpair()
        limit = struct.pack("ll", int(_SILENCE_SECONDS), 0)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        # There is one worker per core. If loading the functions computed with several threads, as
        # torch does, the workers would wait for them forever: a fork has no threads.
        environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self._server = subprocess.Popen(
            [sys.executable, "-m", "prl_lightning.rewards.sandbox.server", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=environment,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C interrupts the trainer, which then stops the server
        )
        theirs.close()
        self._control = Connection(ours.detach())
        self._is_loaded = False
        self._control.send_bytes(load)

    def run(self, tasks: Sequence[Task], done: Callable[[], Any] = lambda: None) -> list[Reply]:
        """Run tasks, in any order.

        Args:
            tasks: The calls.
            done: Called after each task.

        Returns:
            One reply per task.

        Raises:
            TypeError: A function cannot be pickled.
            RuntimeError: The server cannot load the functions, a call's imports take too long, or
                the server ends repeatedly.
        """
        replies: dict[int, Reply] = {}
        run_again: set[int] = set()
        try:
            while missing := {i: task for i, task in enumerate(tasks) if i not in replies}:
                for index, reply in self._replies(missing, fresh=bool(run_again)):
                    kind = reply.failure.kind if reply.failure else ""
                    if reply.failure and kind == "import":
                        raise RuntimeError(reply.failure.message)
                    if kind in ("died", "memory") and index not in run_again:
                        run_again.add(index)
                    else:
                        replies[index] = reply
                        done()
        except BaseException:
            self.stop()
            raise
        return [replies[index] for index in range(len(tasks))]

    def stop(self) -> None:
        """End the server, its workers and everything that they started."""
        if self._server is None:
            return
        self._control.close()
        try:
            self._server.wait(_END_SECONDS if self._is_loaded else 0)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()
        self._server = None

    def _replies(self, tasks: Mapping[int, Task], fresh: bool) -> Iterator[tuple[int, Reply]]:
        """Run tasks by their index, in new workers if `fresh`, until the server ends."""
        left, begun = len(tasks), set[int]()
        try:
            if self._server is None:
                self.start()
            self._wait_until_loaded()
            calls = [(index, task.function, task.seconds) for index, task in tasks.items()]
            self._control.send_bytes(json.dumps({"calls": calls, "fresh": fresh}).encode())
            while left:
                index, fields = self._receive()
                if fields is None:  # a worker is ready for it
                    task = tasks[index]
                    call = (task.function, task.method, task.arguments, task.seed)
                    self._control.send_bytes(pickle.dumps(call))
                    begun.add(index)
                    self._has_ended_idle = False
                    continue
                left -= 1
                begun.discard(index)
                failure = fields.pop("failure", None)
                yield index, Reply(**fields, failure=Failure(**failure) if failure else None)
        except (EOFError, OSError) as error:
            self._note_end(error, is_idle=not begun)
        for index in begun:
            yield index, Reply(failure=DIED)

    def _wait_until_loaded(self) -> None:
        if self._is_loaded:
            return
        seconds = self.limits.import_seconds
        if not self._control.poll(seconds):
            raise RuntimeError(
                f"the {self.called} were not loaded within limits.import_seconds={seconds:g}. "
                "Raise it, or import less when their modules are imported."
            )
        trouble = self._control.recv_bytes().decode()
        if trouble:
            raise RuntimeError(f"the {self.called} cannot be loaded in a process:\n{trouble}")
        self._is_loaded = True

    def _receive(self) -> tuple[int, dict[str, Any] | None]:
        """Receive the index of a call, and its reply or `None` if the call is to be sent."""
        while self._control.poll(_SILENCE_SECONDS):
            index, _, fields = self._control.recv_bytes().partition(b" ")
            if index:  # or it is a sign of life
                return int(index), json.loads(fields)
        raise TimeoutError(f"the server has sent nothing for {_SILENCE_SECONDS:g} s")

    def _note_end(self, error: Exception, is_idle: bool) -> None:
        """Stop the server's remains; raise if it has ended twice in a row with no call running."""
        server = self._server
        self.stop()
        if is_idle and self._has_ended_idle and server is not None:
            raise RuntimeError(
                f"the process of the {self.called} ended twice, with exit code "
                f"{server.returncode}: see its output above; out of memory is the usual reason"
            ) from error
        self._has_ended_idle = is_idle
