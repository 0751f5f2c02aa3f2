"""The processes that call reward functions, forked from one that has loaded what they need.

Forking a process that runs an engine or a tokenizer is unsafe, and starting a fresh one for every
call that had to be killed takes seconds of imports. So one fresh process loads the functions once,
stays single-threaded and forks workers, each in some milliseconds. The standard library's fork
server imports the main program again in every worker, and there is one a program.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import pickle
import random
import resource
import signal
import sys
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from typing import Any

import cloudpickle

_SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux' prctl(2)


def serve(handle: int) -> None:
    """Load the functions, then fork a worker for every connection that is sent.

    Args:
        handle: Of the socket to the trainer's process. Its end is this process's end.
    """
    control = Connection(handle)
    try:
        functions, memory_mib = cloudpickle.loads(control.recv_bytes())
        for function in functions:
            if hasattr(function, "warm_up"):
                function.warm_up()
    except Exception:
        control.send_bytes(traceback.format_exc().encode())
        return
    control.send_bytes(b"")
    gc.freeze()  # a worker's collector would touch, and so copy, all that was loaded
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel buries the dead
    while True:
        try:
            connection = Connection(recv_handle(control))
        except EOFError:  # the trainer has ended
            return
        process = os.fork()
        if process == 0:
            control.close()
            _work(connection, functions, memory_mib)
            os._exit(0)
        connection.close()
        control.send_bytes(str(process).encode())


def _work(connection: Connection, functions: Sequence[Any], memory_mib: int) -> None:
    os.setpgid(0, 0)  # so that it can be killed with what it starts
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)
    _limit_memory(memory_mib)
    connection.send_bytes(b"")
    while True:
        try:
            index, method, arguments, seed = pickle.loads(connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            return
        _seed(seed)
        connection.send_bytes(_reply(functions[index], method, arguments))


def _seed(seed: int) -> None:
    """Seed what is loaded: to load more for it would take seconds."""
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)


def _reply(function: Any, method: str, arguments: dict[str, Any]) -> bytes:
    """JSON: nothing that a reward function returns is unpickled by the trainer."""
    try:
        returned = getattr(function, method)(**arguments)
        values = returned.tolist() if hasattr(returned, "tolist") else returned
        failures = int(getattr(function, "failures", 0)) if method == "__call__" else 0
        reply = {"values": values, "failures": failures}
        return json.dumps(reply, default=lambda value: value.item()).encode()
    except BaseException as error:  # SystemExit too: a worker ends when it is told to
        shown = traceback.format_exc(limit=-8)
        failure = {"kind": type(error).__name__, "message": str(error)[:1000]}
        return json.dumps({"failure": failure | {"traceback": shown[-4000:]}}).encode()


def _limit_memory(mib: int) -> None:
    """Let the process take so much more than it has already."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform != "linux":
        return
    with open("/proc/self/status") as status:
        used = next(int(line.split()[1]) for line in status if line.startswith("VmData:"))
    limit = (used + mib * 1024) * 1024
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    if hard == resource.RLIM_INFINITY or limit < hard:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


if __name__ == "__main__":
    serve(int(sys.argv[1]))
