"""What a worker does: it runs one call after the other and sends what they return."""

from __future__ import annotations

import ctypes
import json
import os
import pickle
import random
import signal
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from prl_lightning.rewards.protocol import awaited
from prl_lightning.rewards.sandbox.import_clock import ImportClock
from prl_lightning.rewards.sandbox.memory import MemoryLimit

_SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux' prctl(2)


def work(
    connection: Connection, functions: Sequence[Any], memory_mib: int, imports: ImportClock
) -> None:
    """Run calls until the server closes the connection, or one of them has no memory left.

    Args:
        connection: Connects the worker to the server.
        functions: The loaded functions.
        memory_mib: Memory limit, in MiB.
        imports: Gets the time of the calls' imports.

    Raises:
        OSError: The server has closed the connection during a call.
    """
    os.setpgid(0, 0)  # a group of its own, to be killed as a whole
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    set_process_option(_SET_DEATH_SIGNAL, signal.SIGKILL)
    imports.start()
    memory = MemoryLimit(memory_mib)
    reply: dict[str, Any] = {}
    while reply.get("failure", {}).get("kind") != "memory":
        try:
            index, method, arguments, seed = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        _seed(seed)
        reply = _reply(functions[index], method, arguments)
        if "failure" not in reply and memory.was_reached():
            # The function caught the MemoryError, as math-verify does, and went on.
            reply = {"failure": describe(MemoryError())}
        if "failure" in reply and reply["failure"]["kind"] == "MemoryError":
            reply["failure"] |= {"kind": "memory", "message": f"more than {memory_mib} MiB"}
        connection.send_bytes(_json(reply))


def set_process_option(option: int, value: int) -> None:
    """Call Linux' prctl(2); does nothing on other systems.

    Args:
        option: Number of the option.
        value: Its value.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value)


def describe(error: BaseException) -> dict[str, str]:
    """Describe an exception as the fields of a `Failure`, even if memory is short.

    Args:
        error: The exception. The frames of its traceback are cleared.
    """
    for one in (error, error.__cause__, error.__context__):
        if one is not None:  # its frames may hold all of the memory
            traceback.clear_frames(one.__traceback__)
    message = shown = ""
    with suppress(Exception):  # memory may still be short, or str(error) may fail
        message = str(error)[:1000]
        shown = "".join(traceback.format_exception(error, limit=-8)) if error.__traceback__ else ""
    return {"kind": type(error).__name__, "message": message, "traceback": shown[-4000:]}


def _seed(seed: int) -> None:
    """Seed the libraries that are loaded; loading others for this would take seconds."""
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)


def _reply(function: Any, method: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Call a function; the reply can be sent as JSON, so that the trainer unpickles nothing."""
    try:
        returned = awaited(getattr(function, method)(**arguments))
        values = returned.tolist() if hasattr(returned, "tolist") else returned
        _json(values)  # if this fails, the function has failed
        if method != "__call__":
            return {"values": values}
        if errors := getattr(function, "errors", ()):
            raise errors[0]
        return {"values": values, "failures": int(getattr(function, "failures", 0))}
    except BaseException as error:  # also SystemExit: only the server ends a worker
        return {"failure": describe(error)}


def _json(value: Any) -> bytes:
    return json.dumps(value, default=lambda number: number.item()).encode()
