"""Reward functions in processes that can be killed."""

from __future__ import annotations

import json
import pickle
import time
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from prl_lightning.rewards.fork_server import ForkServer, Worker
from prl_lightning.rewards.tasks import Failure, Reply, Task

# A call that waits, or has computed for this share of its limit, no longer keeps others waiting: it
# goes on beside them, one of so many, and at the lowest priority if it computes. Not sooner: one
# that only has much to do must not starve. Of the answers in the papers' evaluation sets, the one
# that takes math-verify longest takes it half a second.
_STUBBORN = 0.1
_MAX_ASIDE = 32
_LOOK_SECONDS = 0.005

DIED = Failure(
    "died", "its process has died twice: a crash, an exit, or the system's out-of-memory killer"
)


class RewardWorkers:
    """Call functions in processes of their own, and kill a process that takes too much.

    Nothing here depends on signals or threads of the caller's process, so that it works from any
    thread, of one at a time.

    Args:
        functions: What can be called. One may have a method `warm_up`, which is called once in the
            process that the workers are forked from, for slow imports and tables.
        memory_mib: See `RewardLimits`.
        number: Workers with a core to themselves.
    """

    def __init__(self, functions: Sequence[Any], memory_mib: int, number: int) -> None:
        self.memory_mib = memory_mib
        self.number = number
        self._server = ForkServer(functions, memory_mib)
        self._idle: list[Worker] = []
        self._busy: dict[Connection, Worker] = {}

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
        waiting = deque(range(len(tasks)))
        given_again: set[int] = set()
        try:
            while len(replies) < len(tasks):
                while waiting and self._has_room():
                    index = waiting.popleft()
                    # Not to one that waits: where the process that all were forked from has been
                    # killed, they are all about to end.
                    self._give(index, tasks[index], to_new=index in given_again)
                for index, reply in self._next_replies(others_wait=bool(waiting)):
                    if reply.failure == DIED and index not in given_again:
                        # Perhaps it was killed for what it had no part in: memory is short, say.
                        given_again.add(index)
                        waiting.append(index)
                        continue
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

    def _num_aside(self) -> int:
        return sum(worker.is_aside for worker in self._busy.values())

    def _give(self, index: int, task: Task, to_new: bool) -> None:
        call = pickle.dumps((task.function, task.method, task.arguments, task.seed))
        while True:
            has_one = self._idle and not to_new
            worker = self._idle.pop() if has_one else self._server.fork()
            try:
                worker.connection.send_bytes(call)
                break
            except OSError:  # killed by someone else while it was idle
                worker.kill()
        worker.begin(index, task.seconds)
        self._busy[worker.connection] = worker

    def _next_replies(self, others_wait: bool) -> list[tuple[int, Reply]]:
        """Replies, after waiting for one or until a worker has to be looked after."""
        until = min(worker.started + worker.seconds for worker in self._busy.values())
        if others_wait and self._num_aside() < _MAX_ASIDE:
            until = min(until, time.monotonic() + _LOOK_SECONDS)
        ready: list[Any] = wait(list(self._busy), max(0.0, until - time.monotonic()))
        replies = [self._take(self._busy.pop(connection)) for connection in ready]
        now = time.monotonic()
        for worker in list(self._busy.values()):
            if now - worker.started >= worker.seconds:
                del self._busy[worker.connection]
                worker.kill()
                message = f"not done within {worker.seconds:g} s (limits.seconds)"
                replies.append((worker.index, Reply(failure=Failure("time", message))))
            elif others_wait and now - worker.looked >= _LOOK_SECONDS and not worker.is_aside:
                can_go_aside = self._num_aside() < _MAX_ASIDE
                worker.is_aside = can_go_aside and worker.is_stuck(_STUBBORN * worker.seconds)
        return replies

    def _take(self, worker: Worker) -> tuple[int, Reply]:
        try:
            reply = json.loads(worker.connection.recv_bytes())
        except (EOFError, OSError):
            worker.kill()
            return worker.index, Reply(failure=DIED)
        failure = reply.pop("failure", None)
        is_out_of_memory = failure is not None and failure["kind"] == "MemoryError"
        if is_out_of_memory:
            failure |= {"kind": "memory", "message": f"more than {self.memory_mib} MiB"}
        if is_out_of_memory or worker.is_low:  # a priority cannot be raised again
            worker.kill()
        else:
            self._idle.append(worker)
        return worker.index, Reply(**reply, failure=Failure(**failure) if failure else None)
