"""Reward functions in processes that can be killed."""

from __future__ import annotations

import json
import pickle
import time
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from prl_lightning.rewards.attempts import Attempts, Patience
from prl_lightning.rewards.fork_server import ForkServer, Worker
from prl_lightning.rewards.tasks import DIED, Failure, Reply, Task

# So many calls for every worker may go on beside those that have a core: they wait, as for an
# answer from the network, or have computed for longer than any that came to an end.
_ASIDE = 16

# A new worker does not know what the killed one had learnt: math-verify's tables for the forms of
# the answers at hand, which cost more than most answers. So the process that it was forked from
# repeats calls that took a moment, so many whenever it is asked for one, so many in all.
_REPEATED = 8
_REPEATED_IN_ALL = 64
_REPEATED_SECONDS = 0.1
_REPEATED_BYTES = 20_000


class RewardWorkers:
    """Call functions in processes of their own, and kill a process that takes too much.

    Nothing here depends on signals or threads of the caller's process, so that it works from any
    thread, of one at a time.

    Args:
        functions: What can be called. One may have a method `warm_up`, which is called once in the
            process that the workers are forked from, for slow imports and tables. Of one with a
            true attribute `is_repeatable`, calls may be repeated there for the same end: it must
            start no threads, and keep nothing of a call but tables.
        memory_mib: See `RewardLimits`.
        number: Workers with a core to themselves.
    """

    def __init__(self, functions: Sequence[Any], memory_mib: int, number: int) -> None:
        self.functions = functions
        self.memory_mib = memory_mib
        self.number = number
        self._server = ForkServer(functions, memory_mib)
        self._idle: list[Worker] = []
        self._busy: dict[Connection, Worker] = {}
        self._patience = Patience()
        self._recent: deque[bytes] = deque(maxlen=_REPEATED)
        self._repeated = 0

    def start(self) -> None:
        """Begin to load the functions in their process; without it, the first task does.

        Raises:
            TypeError: If a function cannot be sent to another process.
        """
        self._server.start()

    def run(self, tasks: Sequence[Task], done: Callable[[], Any] = lambda: None) -> list[Reply]:
        """Carry out tasks, in any order.

        Args:
            tasks: What to call.
            done: Called after each.

        Returns:
            A reply for each.

        Raises:
            TypeError: If a function cannot be sent to another process.
            RuntimeError: If the functions cannot be loaded there.
        """
        replies: dict[int, Reply] = {}
        attempts = Attempts(len(tasks), self.number)
        try:
            while len(replies) < len(tasks):
                while self._has_room() and (index := attempts.next()) is not None:
                    self._give(index, tasks[index], to_new=attempts.wants_new(index))
                if not self._busy:
                    over = list(attempts.given_up().items())
                else:
                    over = [
                        (worker.index, reply)
                        for worker, reply in self._next_replies(others_wait=bool(attempts.waiting))
                        if attempts.is_over(worker.index, reply, starved=worker.is_low)
                    ]
                for index, reply in over:
                    replies[index] = reply
                    done()
        except BaseException:
            self.stop()
            raise
        return [replies[index] for index in range(len(tasks))]

    def stop(self) -> None:
        """End every process."""
        for worker in [*self._idle, *self._busy.values()]:
            worker.kill()
        self._idle.clear()
        self._busy.clear()
        self._server.stop()

    def _has_room(self) -> bool:
        return len(self._busy) - self._num_aside() < self.number

    def _has_room_aside(self) -> bool:
        return self._num_aside() < _ASIDE * self.number

    def _num_aside(self) -> int:
        return sum(worker.is_aside for worker in self._busy.values())

    def _give(self, index: int, task: Task, to_new: bool) -> None:
        call = pickle.dumps((task.function, task.method, task.arguments, task.seed))
        has_failed = False
        while True:
            is_new = to_new or not self._idle
            worker = self._server.fork() if is_new else self._idle.pop()
            try:
                worker.connection.send_bytes(call)
                break
            except OSError:  # killed by someone else while it was idle
                worker.kill()
                if is_new and has_failed:
                    raise
                if is_new:  # nothing forks it: the next one is asked of another
                    self._server.stop()
                    has_failed = True
        if is_new:
            self._repeat()
        worker.call = call
        worker.begin(index, task)
        self._busy[worker.connection] = worker

    def _repeat(self) -> None:
        while self._recent and self._repeated < _REPEATED_IN_ALL:
            self._server.repeat(self._recent.pop())
            self._repeated += 1

    def _remember(self, task: Task, call: bytes, used: float) -> None:
        self._patience.note(task, used)
        repeatable = getattr(self.functions[task.function], "is_repeatable", False)
        if repeatable and used < _REPEATED_SECONDS and len(call) < _REPEATED_BYTES:
            self._recent.append(call)

    def _next_replies(self, others_wait: bool) -> list[tuple[Worker, Reply]]:
        """Replies, after waiting for one or until a worker has to be looked after."""
        workers = self._busy.values()
        until = min(worker.deadline for worker in workers)
        looks = [worker.next_look for worker in workers if others_wait and not worker.is_low]
        until = min([until, *looks])
        ready: list[Any] = wait(list(self._busy), max(0.0, until - time.monotonic()))
        heard = [(worker, self._hear(worker)) for worker in map(self._busy.__getitem__, ready)]
        replies = [(worker, reply) for worker, reply in heard if reply is not None]
        for worker in list(workers):
            now = time.monotonic()
            if now >= worker.deadline and worker.connection not in ready:
                replies.append((worker, self._end_late(worker)))
            elif others_wait and now >= worker.next_look and worker.task is not None:
                worker.look(self._patience.with_call(worker.task), self._has_room_aside())
        return replies

    def _end_late(self, worker: Worker) -> Reply:
        del self._busy[worker.connection]
        is_new = worker.process is None
        worker.kill()
        if is_new or worker.task is None:  # nothing forks it: the next one is asked of another
            self._server.stop()
            return Reply(failure=DIED)
        words = f"not done within {worker.task.seconds:g} s (limits.seconds)"
        if worker.is_low:
            words += ", others going first once it had computed for longer than they do"
        return Reply(failure=Failure("time", words))

    def _hear(self, worker: Worker) -> Reply | None:
        """What a worker says of its task, `None` for its first words."""
        try:
            if worker.process is None:
                worker.meet()
                return None
            reply = json.loads(worker.connection.recv_bytes())
        except (EOFError, OSError):
            del self._busy[worker.connection]
            worker.kill()
            return Reply(failure=DIED)
        del self._busy[worker.connection]
        assert worker.task is not None
        is_last = reply.pop("is_last") or worker.is_low  # a priority cannot be raised again
        failure = reply.pop("failure", None)
        if failure is not None and failure["kind"] == "MemoryError":
            failure |= {"kind": "memory", "message": f"more than {self.memory_mib} MiB"}
            is_last = True
        if failure is None:
            self._remember(worker.task, worker.call, reply["used"])
        if is_last:
            worker.kill()
        else:
            self._idle.append(worker)
        return Reply(**reply, failure=Failure(**failure) if failure else None)
