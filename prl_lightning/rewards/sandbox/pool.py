"""The server's pool of workers: forks them, hands out calls, and kills workers."""

from __future__ import annotations

import json
import os
import time
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any

from prl_lightning.rewards.sandbox.import_clock import ImportClock
from prl_lightning.rewards.sandbox.limits import DIED, Failure, RewardLimits
from prl_lightning.rewards.sandbox.timed_worker import SIGN_SECONDS, Call, Worker
from prl_lightning.rewards.sandbox.worker import work

# The short limit: this many times the longest call of the function so far, and at least this share
# of the full limit. A call that hangs costs the short limit. A slow call that does not hang runs
# twice if it exceeds it, and fails without the second run if too many late calls in a row time out.
_LONGEST = 3.0
_SHORT = 0.1


class Pool:
    """Run calls in workers, in two passes; see `RewardLimits`.

    Args:
        control: Connects the server to the trainer.
        functions: The loaded functions.
        limits: Limits of memory and imports.
        size: Number of workers.
        lost: What this process has and its forks lack; see `lost_by_forks`.
    """

    def __init__(
        self,
        control: Connection,
        functions: Sequence[Any],
        limits: RewardLimits,
        size: int,
        lost: str,
    ) -> None:
        self._control = control
        self._functions = functions
        self._limits = limits
        self._size = size
        self._hint = lost and (
            f"; loading the functions has started {lost}, which workers lack because they are "
            "forks: start them at the first call and not on import"
        )
        self._idle: list[Worker] = []
        self._busy: dict[Connection, Worker] = {}
        self._longest: dict[int, float] = {}  # by function, seconds of its longest call

    def run(self, calls: Sequence[Call], fresh: bool) -> None:
        """Run calls and report each outcome to the trainer.

        Args:
            calls: The calls.
            fresh: Whether to use new workers only.

        Raises:
            EOFError: The trainer has closed the connection.
        """
        while fresh and self._idle:
            self._idle.pop().kill()
        self._longest = {name: seconds / 2 for name, seconds in self._longest.items()}  # forget
        late = self._run_pass(deque(calls), is_first=True, patience=len(calls))
        patience = max(2, self._size)
        for call in self._run_pass(late, is_first=False, patience=patience):
            late_too = f"ran out of time, as did the {patience} calls that ran again before"
            self._fail(call, Failure("time", late_too))

    def _run_pass(self, queue: deque[Call], is_first: bool, patience: int) -> deque[Call]:
        """Run calls under the short or the full limit; return those without an outcome.

        It begins no more calls once as many calls in a row as `patience` have run out of time.
        """
        late, in_a_row, signed = deque[Call](), 0, time.monotonic()
        while self._busy or (queue and in_a_row < patience):
            while queue and in_a_row < patience and len(self._busy) < self._size:
                self._begin(queue.popleft(), is_first)
            for worker, overrun in self._wait():
                in_a_row = in_a_row + 1 if overrun else 0
                if overrun and overrun.kind == "time" and worker.limit < worker.call.seconds:
                    late.append(worker.call)
                elif overrun:
                    self._fail(worker.call, overrun)
            if time.monotonic() > signed + SIGN_SECONDS:
                self._control.send_bytes(b"")
                signed = time.monotonic()
        return late + queue

    def _begin(self, call: Call, is_first: bool) -> None:
        self._control.send_bytes(b"%d null" % call.number)
        body = self._control.recv_bytes()
        while self._idle and self._idle[-1].connection.poll():  # it has ended
            self._idle.pop().kill()
        worker = self._idle.pop() if self._idle else self._fork()
        limit = call.seconds
        if is_first and call.function in self._longest:
            short = max(_SHORT * limit, _LONGEST * self._longest[call.function])
            limit = min(limit, short)
        worker.begin(call, body, limit)
        self._busy[worker.connection] = worker

    def _wait(self) -> Iterator[tuple[Worker, Failure | None]]:
        """Wait for a reply or a look; yield workers that are done, with the limit exceeded."""
        until = min(worker.next_look for worker in self._busy.values())
        ready = wait([self._control, *self._busy], max(0.0, until - time.monotonic()))
        if self._control in ready:  # while calls run, the trainer sends nothing
            raise EOFError("the trainer has closed the connection")
        for connection, worker in list(self._busy.items()):
            overrun = None
            if time.monotonic() >= worker.next_look:
                worker.look()
                overrun = worker.overrun(self._limits.import_seconds)
            if connection.poll():  # in time even after an overrun: this process may have been late
                overrun = None
                self._hear(worker)
            elif overrun:
                self._longest.setdefault(worker.call.function, 0.0)
                worker.kill()
            else:
                continue
            del self._busy[connection]
            yield worker, overrun

    def _hear(self, worker: Worker) -> None:
        call = worker.call
        try:
            self._control.send_bytes(b"%d " % call.number + worker.connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            worker.kill()
            self._fail(call, DIED)
            return
        self._idle.append(worker)
        longest = self._longest.get(call.function, 0.0)
        if time.monotonic() - worker.begun >= longest:  # or it cannot have taken longer
            self._longest[call.function] = max(longest, worker.look())

    def _fail(self, call: Call, failure: Failure) -> None:
        if failure.kind == "time":
            failure = replace(failure, message=failure.message + self._hint)
        reply = json.dumps({"failure": asdict(failure)}).encode()
        self._control.send_bytes(b"%d " % call.number + reply)

    def _fork(self) -> Worker:
        ours, theirs = Pipe()
        imports = ImportClock()
        others = [self._control, ours, *(worker.connection for worker in self._idle), *self._busy]
        process = os.fork()
        if process == 0:
            try:
                for connection in others:
                    connection.close()
                work(theirs, self._functions, self._limits.memory_mib, imports)
            except OSError:  # the server has ended
                pass
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)
        theirs.close()
        with suppress(OSError):  # the worker does it too, whichever comes first
            os.setpgid(process, process)
        return Worker(ours, process, imports)
