"""A worker as the server sees it: the clocks of its call, and its end."""

from __future__ import annotations

import time
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import NamedTuple

from prl_lightning.rewards.sandbox.import_clock import ImportClock
from prl_lightning.rewards.sandbox.limits import Failure
from prl_lightning.rewards.sandbox.process_tree import kill_tree, usage

_WAITING = 2.0  # times the limit: what a call waits for may be slow because the machine is busy

# A worker is looked at whenever its call's age has grown by a tenth, at the soonest after this.
_LOOK_SHARE = 0.1
_LOOK_SECONDS = 0.01
SIGN_SECONDS = 1.0  # between signs of life to the trainer


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
        imports: The time of its imports.

    Attributes:
        connection: Likewise.
        call: The current call.
        limit: Limit of the current call's processor time in this pass, in seconds.
        begun: When the current call began, by the monotonic clock.
        next_look: When to look at it again.
    """

    def __init__(self, connection: Connection, process: int, imports: ImportClock) -> None:
        self.connection = connection
        self._process = process
        self._imports = imports

    def begin(self, call: Call, body: bytes, limit: float) -> None:
        """Send it a call and start the clocks.

        Args:
            call: The call.
            body: What to send for it.
            limit: Limit of its processor time, in seconds.
        """
        self.call, self.limit = call, limit
        self._computed = self._waited = 0.0
        self._imported = self._first_import = self._imports.seconds()
        self._used, _ = usage(self._process)
        self.begun = self._looked = time.monotonic()
        self.next_look = self.begun + _LOOK_SECONDS
        with suppress(OSError):  # it has died, and its connection says so
            self.connection.send_bytes(body)

    def look(self) -> float:
        """Advance the clocks.

        Returns:
            How many seconds the call has taken without imports, by the clock that is ahead.
        """
        (used, is_ready), now = usage(self._process), time.monotonic()
        imported = self._imports.seconds()
        in_imports = max(0.0, imported - self._imported)
        computed = max(0.0, used - self._used - in_imports)
        self._computed += computed
        if not is_ready:
            self._waited += max(0.0, now - self._looked - in_imports - computed)
        self._used, self._looked, self._imported = used, now, imported
        pause = max(_LOOK_SECONDS, _LOOK_SHARE * (now - self.begun))
        self.next_look = now + min(pause, SIGN_SECONDS)
        return max(self._computed, self._waited)

    def overrun(self, import_seconds: float) -> Failure | None:
        """Return the limit that the call had exceeded at the last look, or None.

        Args:
            import_seconds: See `RewardLimits`.
        """
        if self._imported - self._first_import >= import_seconds:
            return Failure(
                "import",
                "a call of a reward function spent more time in imports than "
                f"limits.import_seconds={import_seconds:g}. Raise it, or import less.",
            )
        waiting = self.limit if self.limit < self.call.seconds else _WAITING * self.limit
        if self._computed >= self.limit:
            took = f"took more than {self.limit:g} s of processor time (limits.seconds)"
            return Failure("time", took)
        if self._waited >= waiting:
            waited = f"waited for more than {waiting:g} s (limits.seconds={self.call.seconds:g})"
            return Failure("time", waited)
        return None

    def kill(self) -> None:
        """Kill it and everything that it started."""
        self.connection.close()
        kill_tree(self._process)
