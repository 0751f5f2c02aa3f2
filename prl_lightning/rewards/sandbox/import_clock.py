"""Time that a worker spends in imports, which has a limit of its own."""

from __future__ import annotations

import importlib
import mmap
import threading
import time
from typing import Any


class ImportClock:
    """Seconds that a process has spent in imports; also the process that forked it can read them.

    Create it before the fork, and call `start` after it, in the child.
    """

    def __init__(self) -> None:
        # Seconds of the imports that have ended, and since when one is running, or 0.
        self._shared = memoryview(mmap.mmap(-1, 16)).cast("d")
        self._depth = 0
        self._lock = threading.Lock()

    def seconds(self) -> float:
        """Return how long imports have taken so far, with the one that is running."""
        ended, since = self._shared
        return ended + (time.monotonic() - since if since else 0.0)

    def start(self) -> None:
        """Time every import of this process, by a statement or by `importlib`."""
        # Both call this private function, and only for a module that is not loaded. The hooks of
        # the public sys.meta_path do not tell when an import ends.
        bootstrap: Any = importlib._bootstrap
        load = bootstrap._find_and_load

        def timed(*args: Any) -> Any:
            self._enter()
            try:
                return load(*args)
            finally:
                self._exit()

        bootstrap._find_and_load = timed

    def _enter(self) -> None:
        with self._lock:
            self._depth += 1
            if self._depth == 1:
                self._shared[1] = time.monotonic()

    def _exit(self) -> None:
        with self._lock:
            self._depth -= 1
            if self._depth == 0:
                self._shared[0] = self.seconds()
                self._shared[1] = 0.0
