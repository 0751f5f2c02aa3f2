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
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from typing import Any

import cloudpickle

from prl_lightning.rewards.memory import Allowance
from prl_lightning.rewards.processes import descendants

# Of Linux' prctl(2).
_SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG
_SET_CHILD_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER

_END_SECONDS = 5.0


def serve(handle: int) -> None:
    """Load the functions, then fork a worker for every connection that is sent.

    Args:
        handle: Of the socket to the trainer's process. Its end is this process's end.
    """
    # What workers have started becomes a child of this process where they end before it.
    _set_process(_SET_CHILD_SUBREAPER, 1)
    try:
        _serve(Connection(handle))
    finally:
        _end_descendants()


def _serve(control: Connection) -> None:
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
            call = control.recv_bytes()
            if call:
                _carry_out(call, functions)
                gc.freeze()
                continue
            connection = Connection(recv_handle(control))
        except EOFError:  # the trainer has ended
            return
        if os.fork() == 0:
            try:
                control.close()
                _work(connection, functions, memory_mib)
            except OSError:  # the trainer has ended, or does not want it any more
                pass
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)
        connection.close()


def _end_descendants() -> None:
    """Also those in groups and sessions of their own, and those of workers that are dead."""
    until = time.monotonic() + _END_SECONDS
    while (found := descendants(os.getpid())) and time.monotonic() < until:
        for process in found:
            with suppress(OSError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.01)


def _work(connection: Connection, functions: Sequence[Any], memory_mib: int) -> None:
    os.setpgid(0, 0)  # so that it can be killed with what it starts
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _set_process(_SET_DEATH_SIGNAL, signal.SIGKILL)
    allowance = Allowance(memory_mib)
    connection.send_bytes(str(os.getpid()).encode())
    called: set[int] = set()
    while True:
        try:
            call = connection.recv_bytes()
        except EOFError:
            return
        before = _used_seconds()
        index, reply = _carry_out(call, functions)
        if "failure" not in reply and allowance.was_used_up():
            # Whatever it returned: it may have caught the error, as math-verify does, and gone on.
            reply = {"failure": _described(MemoryError())}
        is_low = allowance.is_low(is_first=index not in called)
        called.add(index)
        about = {"used": _used_seconds() - before, "is_last": is_low}
        connection.send_bytes(_json(reply | about))


def _carry_out(call: bytes, functions: Sequence[Any]) -> tuple[int, dict[str, Any]]:
    index, method, arguments, seed = pickle.loads(call)
    _seed(seed)
    return index, _reply(functions[index], method, arguments)


def _set_process(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value)


def _used_seconds() -> float:
    """Of a core, by this process and by its children that have ended."""
    return sum(os.times()[:4])


def _seed(seed: int) -> None:
    """Seed what is loaded: to load more for it would take seconds."""
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)


def _reply(function: Any, method: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """For JSON: nothing that a reward function returns is unpickled by the trainer."""
    try:
        returned = getattr(function, method)(**arguments)
        values = returned.tolist() if hasattr(returned, "tolist") else returned
        _json(values)  # or it fails here, where that is the function's failure
        if method != "__call__":
            return {"values": values}
        if errors := getattr(function, "errors", ()):
            raise errors[0]
        return {"values": values, "failures": int(getattr(function, "failures", 0))}
    except BaseException as error:  # SystemExit too: a worker ends when it is told to
        return {"failure": _described(error)}


def _json(value: Any) -> bytes:
    return json.dumps(value, default=lambda number: number.item()).encode()


def _described(error: BaseException) -> dict[str, str]:
    for one in (error, error.__cause__, error.__context__):
        if one is not None:  # its frames may hold all the memory there is
            traceback.clear_frames(one.__traceback__)
    message = shown = ""
    with suppress(Exception):  # there may still be none, or no words in the error
        message = str(error)[:1000]
        shown = "".join(traceback.format_exception(error, limit=-8)) if error.__traceback__ else ""
    return {"kind": type(error).__name__, "message": message, "traceback": shown[-4000:]}


if __name__ == "__main__":
    serve(int(sys.argv[1]))
