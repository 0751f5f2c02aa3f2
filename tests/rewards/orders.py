"""Reward functions that do what a completion tells them to, and what their tests wait for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from prl_lightning.rewards import RewardLimits

TIGHT = RewardLimits(seconds=2.0, memory_mib=256, failure_value=-1.0, workers=2)
PATIENT_256 = RewardLimits(seconds=120.0, memory_mib=256, failure_value=-1.0, workers=2)
PATIENT = RewardLimits(seconds=120.0, failure_value=-1.0, workers=2)
BYTES = 8 << 30


def length(completions: Sequence[str], **columns: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def obey(completions: Sequence[str], **columns: Any) -> Any:
    """Do what the completion says."""
    values: list[Any] = []
    for text in completions:
        match text.split():
            case ["sleep"]:
                time.sleep(1000)
            case ["compute"]:
                values.append(10 ** (10**10))
            case ["fill"]:
                values.append(len(bytearray(BYTES)))
            case ["exit"]:
                os._exit(3)
            case ["crash"]:
                os.kill(os.getpid(), signal.SIGSEGV)
            case ["quit"]:
                sys.exit(0)
            case ["busy", seconds]:
                end = time.process_time() + float(seconds)
                while time.process_time() < end:
                    pass
                values.append(1.0)
            case ["run", seconds]:
                code = f"import time\nwhile time.process_time() < {seconds}: pass"
                subprocess.run([sys.executable, "-S", "-c", code], check=True)
                values.append(1.0)
            case ["raise"]:
                raise KeyError("no such thing")
            case ["spawn", file]:
                children = [
                    subprocess.Popen(["sleep", "1000"], start_new_session=alone)
                    for alone in (False, True)
                ]
                Path(file).write_text(" ".join(map(str, [os.getpid(), *pids_of(children)])))
                children[0].wait()
            case ["meet", folder, number]:
                (Path(folder) / str(os.getpid())).touch()
                while len(os.listdir(folder)) < int(number):
                    time.sleep(0.01)
                values.append(2.0)
            case ["nan"]:
                values.append(float("nan"))
            case ["text"]:
                values.append("one")
            case ["none"]:
                values.append(None)
            case ["priority"]:
                values.append(float(os.getpriority(os.PRIO_PROCESS, 0)))
            case _:
                values.append(1.0)
    return values


def pids_of(children: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    return [child.pid for child in children]


class Whole:
    """Wants all completions of a call."""

    needs_batch = True

    def __call__(self, completions: Sequence[str], **columns: Any) -> list[float]:
        return [len(completions) - rank for rank, _ in enumerate(completions)]


def is_alive(process: int) -> bool:
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rsplit(")", 1)[1].split()[0] != "Z"


def wait_until(is_so: Callable[[], bool], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not is_so():
        time.sleep(0.05)
    return is_so()
