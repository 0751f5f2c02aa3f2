"""The server's pool of workers: forks them, hands out calls, times them, and kills workers."""

from __future__ import annotations

import json
import os
import time
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

from prl_lightning.rewards.sandbox.limits import DIED, Failure
from prl_lightning.rewards.sandbox.process_tree import kill_tree, usage
from prl_lightning.rewards.sandbox.worker import work

# The short limit: this many times the longest call of the function so far, and at least this share
# of the full limit. A call that hangs costs the short limit. A slow call that does not hang runs
# twice if it exceeds it, and fails without the second run if too many late calls in a row time out.
_LONGEST = 3.0
_SHORT = 0.1
_WAITING = 2.0  # times the limit: what a call waits for may be slow because the machine is busy

# A worker is looked at whenever its call's age has grown by a tenth, at the soonest after this.
_LOOK_SHARE = 0.1
_LOOK_SECONDS = 0.01
_SIGN_SECONDS = 1.0  # between signs of life to the trainer


class Call(NamedTuple):
    """A call, as the server sees it; the trainer has its arguments.

    Attributes:
        number: Identifies the call.
        function: Index of the function.
        seconds: Full limit of its processor time.
    """

    number: int
    function: int
    seconds: float


class Worker:
    """A process that runs calls, one at a time, and the clocks of its current call.

    Args:
        connection: Connects the server to it.
        process: Its process id, and the id of its process group.

    Attributes:
        connection: Likewise.
        call: The current call.
        limit: Limit of the current call's processor time in this pass, in seconds.
        begun: When the current call began, by the monotonic clock.
        next_look: When to look at it again.
    """

    def __init__(self, connection: Connection, process: int) -> None:
        self.connection = connection
        self._process = process

    def begin(self, call: Call, body: bytes, limit: float) -> None:
        """Send it a call and start the clocks.

        Args:
            call: The call.
            body: What to send for it.
            limit: Limit of its processor time, in seconds.
        """
        self.call, self.limit = call, limit
        self._computed = self._waited = 0.0
        self._used, _ = usage(self._process)
        self.begun = self._looked = time.monotonic()
        self.next_look = self.begun + _LOOK_SECONDS
        with suppress(OSError):  # it has died, and its connection says so
            self.connection.send_bytes(body)

    def look(self) -> float:
        """Advance the clocks.

        Returns:
            How many seconds the call has taken, by the clock that is ahead.
        """
        (used, is_ready), now = usage(self._process), time.monotonic()
        computed = max(0.0, used - self._used)
        self._computed += computed
        if not is_ready:
            self._waited += max(0.0, now - self._looked - computed)
        self._used, self._looked = used, now
        pause = max(_LOOK_SECONDS, _LOOK_SHARE * (now - self.begun))
        self.next_look = now + min(pause, _SIGN_SECONDS)
        return max(self._computed, self._waited)

    def overrun(self) -> str:
        """Describe the limit that the call had exceeded at the last look; empty if none."""
        waiting = self.limit if self.limit < self.call.seconds else _WAITING * self.limit
        if self._computed >= self.limit:
            return f"took more than {self.limit:g} s of processor time (limits.seconds)"
        if self._waited >= waiting:
            return f"waited for more than {waiting:g} s (limits.seconds={self.call.seconds:g})"
        return ""

    def kill(self) -> None:
        """Kill it and everything that it started."""
        self.connection.close()
        kill_tree(self._process)


class Pool:
    """Run calls in workers, in two passes; see `RewardLimits`.

    Args:
        control: Connects the server to the trainer.
        functions: The loaded functions.
        memory_mib: Memory limit of a worker, in MiB.
        size: Number of workers.
    """

    def __init__(
        self, control: Connection, functions: Sequence[Any], memory_mib: int, size: int
    ) -> None:
        self._control = control
        self._functions = functions
        self._memory_mib = memory_mib
        self._size = size
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
            self._fail(call, f"ran out of time, as did the {patience} calls that ran again before")

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
                if overrun and worker.limit < worker.call.seconds:
                    late.append(worker.call)
                elif overrun:
                    self._fail(worker.call, overrun)
            if time.monotonic() > signed + _SIGN_SECONDS:
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

    def _wait(self) -> Iterator[tuple[Worker, str]]:
        """Wait for a reply or a look; yield workers that are done, with the limit exceeded."""
        until = min(worker.next_look for worker in self._busy.values())
        ready = wait([self._control, *self._busy], max(0.0, until - time.monotonic()))
        if self._control in ready:  # while calls run, the trainer sends nothing
            raise EOFError("the trainer has closed the connection")
        for connection, worker in list(self._busy.items()):
            overrun = ""
            if time.monotonic() >= worker.next_look:
                worker.look()
                overrun = worker.overrun()
            if connection.poll():  # in time even after an overrun: this process may have been late
                overrun = ""
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

    def _fail(self, call: Call, failure: Failure | str) -> None:
        if isinstance(failure, str):
            failure = Failure("time", failure)
        reply = json.dumps({"failure": asdict(failure)}).encode()
        self._control.send_bytes(b"%d " % call.number + reply)

    def _fork(self) -> Worker:
        ours, theirs = Pipe()
        others = [self._control, ours, *(worker.connection for worker in self._idle), *self._busy]
        process = os.fork()
        if process == 0:
            try:
                for connection in others:
                    connection.close()
                work(theirs, self._functions, self._memory_mib)
            except OSError:  # the server has ended
                pass
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)
        theirs.close()
        with suppress(OSError):  # the worker does it too, whichever comes first
            os.setpgid(process, process)
        return Worker(ours, process)
