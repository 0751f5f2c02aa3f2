"""Processes that begin with everything imported, by multiprocessing's fork server.

A process of its own needs some seconds to import torch, Lightning and transformers, and the tests
start a hundred of them.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["prl_lightning.cli.lightning", "prl_lightning.sampling"])

Variables = dict[str, str]


class Warm:
    """One or several processes in a process group; the first one leads it.

    Args:
        function: Called in each process, as in a main program.
        args: Its arguments.
        environments: Variables of each process, over those of this one.
        cwd: Working directory.
    """

    def __init__(
        self, function: Callable[..., Any], args: Sequence[Any], environments: Sequence[Variables],
        cwd: Path,
    ) -> None:  # fmt: skip
        file, name = tempfile.mkstemp(suffix=".log")
        os.close(file)
        self._log = Path(name)
        self.processes: list[BaseProcess] = []
        self.pid = 0
        for variables in environments:
            process = CONTEXT.Process(
                target=_begin, args=(self.pid, name, str(cwd), variables, function, args)
            )
            process.start()
            self.processes.append(process)
            self.pid = self.pid or process.pid or 0

    def finish(self, timeout: float = 300) -> tuple[int, str]:
        """Exit code and output. Where one process fails or is killed, the others are killed."""
        left = {process.sentinel for process in self.processes}
        while left and (ended := wait(left, timeout)):
            left -= set(ended)
            if any(process.exitcode for process in self.processes):
                break
        is_late = bool(left) and not any(process.exitcode for process in self.processes)
        for process in self.processes:
            process.kill()
            process.join()
        output = self._log.read_text(errors="replace")
        self._log.unlink()
        assert not is_late, f"not finished after {timeout} s:\n{output}"
        return next((p.exitcode for p in self.processes if p.exitcode), 0), output


def _begin(
    leader: int, log: str, cwd: str, variables: Variables, function: Callable[..., Any],
    args: Sequence[Any],
) -> None:  # fmt: skip
    while True:
        try:
            os.setpgid(0, leader)
            break
        except PermissionError:  # the leader has not begun
            continue
    signal.signal(signal.SIGINT, signal.default_int_handler)
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(cwd)
    os.environ.update(variables)
    sys.path[:0] = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    function(*args)


def ranks_of(number: int, port: int) -> list[Variables]:
    """Variables of each rank, as torchrun sets them on one machine."""
    return [
        {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "GROUP_RANK": "0",
            "WORLD_SIZE": str(number),
            "LOCAL_WORLD_SIZE": str(number),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_RUN_ID": "tests",
        }
        for rank in range(number)
    ]
