"""Which task is next, and which gets a second attempt."""

from __future__ import annotations

from collections import deque

from prl_lightning.rewards.tasks import DIED, Reply, Task

# A call may compute for so many seconds, or for so many times as long as any of the last calls of
# its function did, before it is taken for one that may never end. That is a guess, which a second
# attempt makes good. The higher, the more a call that never ends takes from the others.
_SECONDS = 0.05
_TIMES = 1.5
_REMEMBERED = 1024


class Patience:
    """How long a call may compute before it has to let the others go first.

    Measured by the calls of the same function that came to an end. A share of the time limit says
    nothing: it is short for a function that always takes half of it, and long for one that takes
    milliseconds.
    """

    def __init__(self) -> None:
        self._used: dict[tuple[int, str], deque[float]] = {}

    def note(self, task: Task, seconds: float) -> None:
        """Remember a call that came to an end.

        Args:
            task: What was called.
            seconds: Of a core that it used.
        """
        used = self._used.setdefault((task.function, task.method), deque(maxlen=_REMEMBERED))
        used.append(seconds)

    def with_call(self, task: Task) -> float:
        """Seconds of a core, without bound while no call of its function has come to an end.

        Args:
            task: What is called.
        """
        used = self._used.get((task.function, task.method))
        return max(_SECONDS, _TIMES * max(used)) if used else float("inf")


class Attempts:
    """The tasks that have no reply yet.

    One whose process has died gets a second attempt: perhaps it was killed for what it had no part
    in, as memory was short. One that had to let others go first, and whose time ended meanwhile,
    gets one too, after all others and with a core to itself: it may only have had much to do. If
    that was in vain for several in a row, the rest of them will not do better.

    Args:
        number: Of tasks.
        workers: With a core to themselves.
    """

    def __init__(self, number: int, workers: int) -> None:
        self.waiting = deque(range(number))
        self._starved: deque[int] = deque()
        self._first_replies: dict[int, Reply] = {}
        self._was_given_again: set[int] = set()
        self._in_vain = 0
        self._may_be_in_vain = max(2, workers)

    def next(self) -> int | None:
        """The number of the task to begin with, if there is one."""
        if self.waiting:
            return self.waiting.popleft()
        if self._starved and self._in_vain < self._may_be_in_vain:
            return self._starved.popleft()
        return None

    def wants_new(self, index: int) -> bool:
        """Whether a task must not have a process that others had.

        Args:
            index: Of the task, which was given before if so. Where the process that all were
                forked from has been killed, those that wait are about to end.
        """
        return index in self._was_given_again

    def is_over(self, index: int, reply: Reply, starved: bool) -> bool:
        """Whether a reply counts; otherwise there will be another attempt.

        Args:
            index: Of the task.
            reply: To it.
            starved: Whether its time ended while it had to let others go first.
        """
        timed_out = reply.failure is not None and reply.failure.kind == "time"
        if index in self._first_replies:
            self._in_vain = self._in_vain + 1 if timed_out else 0
        if index in self._was_given_again or not (starved or reply.failure == DIED):
            return True
        self._was_given_again.add(index)
        if starved:
            self._first_replies[index] = reply
            self._starved.append(index)
        else:
            self.waiting.append(index)
        return False

    def given_up(self) -> dict[int, Reply]:
        """First replies to those whose second attempts would be in vain; nothing else is left."""
        return {index: self._first_replies[index] for index in self._starved}
