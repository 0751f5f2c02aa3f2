"""The process that loads the reward functions once, and forks the workers that call them."""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import time
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection

import cloudpickle

from prl_lightning.rewards.sandbox.pool import Pool
from prl_lightning.rewards.sandbox.process_tree import descendants, lost_by_forks
from prl_lightning.rewards.sandbox.timed_worker import Call
from prl_lightning.rewards.sandbox.worker import set_process_option

_SET_CHILD_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of Linux' prctl(2)
_END_SECONDS = 5.0


def serve(control: Connection) -> None:
    """Load the functions, then run batches of calls until the trainer closes the connection.

    Args:
        control: Connects the server to the trainer.
    """
    try:
        functions, limits, size = cloudpickle.loads(control.recv_bytes())
        for function in functions:
            if hasattr(function, "warm_up"):
                function.warm_up()
    except Exception:
        control.send_bytes(traceback.format_exc().encode())
        return
    control.send_bytes(b"")
    gc.freeze()  # or a worker's garbage collector would touch, and so copy, everything loaded
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps workers and their orphans
    pool = Pool(control, functions, limits, size, lost_by_forks())
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            batch = json.loads(control.recv_bytes())
            pool.run([Call(*fields) for fields in batch["calls"]], batch["fresh"])


def _kill_descendants() -> None:
    """Kill all workers and what they started, also in process groups or sessions of their own."""
    until = time.monotonic() + _END_SECONDS
    while (found := descendants(os.getpid())) and time.monotonic() < until:
        for process in found:
            with suppress(OSError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.01)


if __name__ == "__main__":
    # What a dead worker started becomes a child of this process.
    set_process_option(_SET_CHILD_SUBREAPER, 1)
    try:
        serve(Connection(int(sys.argv[1])))
    finally:
        _kill_descendants()
