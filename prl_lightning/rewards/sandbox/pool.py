"""The server's pool of workers: forks them, hands out calls, times them, and kills workers."""

from __future__ import annotations

import json
import os
import time
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any

from prl_lightning.rewards.sandbox.limits import DIED, Failure
from prl_lightning.rewards.sandbox.process_tree import kill_tree, usage
from prl_lightning.rewards.sandbox.worker import work

# The first pass's share of a call's limit. A call that hangs costs this share, and a call that
# takes longer than it is computed twice: a tenth keeps both costs small.
_SHORT = 0.1
_WAITING = 2.0  # times the limit: what a call waits for may be slow because the machine is busy
_LOADING = 2.0  # times what first calls of the function took so far

# A worker is looked at when its call's age has grown by a tenth, within these bounds.
_LOOK_SHARE = 0.1
_LOOK_SECONDS = (0.01, 1.0)


@dataclass(frozen=True)
class Call:
    """A call, as the server sees it.

    Attributes:
        index: Identifies the call to the trainer, which has its arguments.
        function: Index of the function.
        seconds: Full limit of its processor time.
    """

    index: int
    function: int
    seconds: float


class Worker:
    """A process that runs calls, one at a time, and the clocks of its current call.

    Args:
        connection: Connects the server to it.
        process: Its process id, and the id of its process group.

    Attributes:
        connection: Likewise.
        called: The functions that have been called in it.
        call: The current call.
        limit: The limit of the current call's processor time in this pass, in seconds.
        next_look: When to look at it again, by the monotonic clock.
    """

    def __init__(self, connection: Connection, process: int) -> None:
        self.connection = connection
        self.called: set[int] = set()
        self._process = process

    def begin(self, call: Call, body: bytes, limit: float) -> None:
        """Send it a call and start the clocks.

        Args:
            call: The call.
            body: What to send for it.
            limit: Its limit in this pass, in seconds.
        """
        self.call, self.limit = call, limit
        self._computed = self._waited = 0.0
        self._used = usage(self._process)[0]
        self._begun = self._looked = time.monotonic()
        self.next_look = self._begun + _LOOK_SECONDS[0]
        with suppress(OSError):  # it has died, which its connection will tell
            self.connection.send_bytes(body)

    def look(self) -> float:
        """Advance the clocks.

        Returns:
            The seconds that the call has taken so far, by the clock that is ahead.
        """
        used, is_ready = usage(self._process)
        now = time.monotonic()
        computed = max(0.0, used - self._used)
        self._computed += computed
        if not is_ready:
            self._waited += max(0.0, now - self._looked - computed)
        self._used, self._looked = used, now
        shortest, longest = _LOOK_SECONDS
        self.next_look = now + min(longest, max(shortest, _LOOK_SHARE * (now - self._begun)))
        return max(self._computed, self._waited)

    def overrun(self) -> str:
        """Describe the limit that the call has exceeded at the last look; empty if none."""
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
        self._loading: dict[int, float] = {}  # by function, seconds of its longest first call

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
        late: dict[Call, str] = {}
        for worker, reply, overrun in self._outcomes(deque(calls), _SHORT):
            if overrun and worker.limit < worker.call.seconds:
                late[worker.call] = overrun
            else:
                self._report(worker.call, reply)
        queue, in_a_row = deque(late), 0
        for worker, reply, overrun in self._outcomes(queue, 1.0):
            del late[worker.call]
            self._report(worker.call, reply)
            in_a_row = in_a_row + 1 if overrun else 0
            if in_a_row == max(2, self._size):
                queue.clear()
        for call, overrun in late.items():
            words = f"{overrun}; not run again, since {in_a_row} others exceeded the full limit"
            self._report(call, _failed(Failure("time", words)))

    def _outcomes(self, queue: deque[Call], share: float) -> Iterator[tuple[Worker, bytes, str]]:
        """Run calls under a share of their limits.

        Yields:
            The worker, its reply, and the limit that the call exceeded, if any.
        """
        last_sign = time.monotonic()
        while queue or self._busy:
            while queue and len(self._busy) < self._size:
                self._begin(queue.popleft(), share)
            until = min(worker.next_look for worker in self._busy.values())
            ready = wait([self._control, *self._busy], max(0.0, until - time.monotonic()))
            if self._control in ready:  # while calls run, the trainer sends nothing
                raise EOFError("the trainer has closed the connection")
            for connection in list(self._busy):
                worker = self._busy[connection]
                if connection in ready:
                    yield worker, self._hear(worker), ""
                elif time.monotonic() >= worker.next_look and (overrun := self._check(worker)):
                    yield worker, _failed(Failure("time", overrun)), overrun
            if time.monotonic() > last_sign + _LOOK_SECONDS[1]:
                self._control.send_bytes(b"")  # a sign of life
                last_sign = time.monotonic()

    def _begin(self, call: Call, share: float) -> None:
        self._control.send_bytes(b"%d null" % call.index)
        body = self._control.recv_bytes()
        worker = self._idle.pop() if self._idle else self._fork()
        limit = share * call.seconds
        if call.function not in worker.called:
            limit += _LOADING * self._loading.get(call.function, float("inf"))
        worker.begin(call, body, min(limit, call.seconds))
        self._busy[worker.connection] = worker

    def _hear(self, worker: Worker) -> bytes:
        del self._busy[worker.connection]
        try:
            is_last, reply = worker.connection.recv_bytes().split(b" ", 1)
        except (EOFError, OSError):
            worker.kill()
            return _failed(DIED)
        if worker.call.function not in worker.called:
            worker.called.add(worker.call.function)
            self._note_first_call(worker.call.function, worker.look())
        if is_last == b"1":
            worker.kill()
        else:
            self._idle.append(worker)
        return reply

    def _check(self, worker: Worker) -> str:
        """Kill a worker whose call exceeds a limit, and say which."""
        worker.look()
        overrun = worker.overrun()
        if not overrun or worker.connection.poll():  # or it has just replied
            return ""
        del self._busy[worker.connection]
        worker.kill()
        if worker.call.function not in worker.called:  # from now on such calls get less time
            self._note_first_call(worker.call.function, 0.0)
        return overrun

    def _note_first_call(self, function: int, seconds: float) -> None:
        self._loading[function] = max(seconds, self._loading.get(function, 0.0))

    def _report(self, call: Call, reply: bytes) -> None:
        self._control.send_bytes(b"%d " % call.index + reply)

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


def _failed(failure: Failure) -> bytes:
    return json.dumps({"failure": asdict(failure)}).encode()
