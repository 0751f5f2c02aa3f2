"""Reward functions that do what a completion tells them to, and helpers of their tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from prl_lightning.rewards import RewardLimits

TIGHT = RewardLimits(seconds=1.0, memory_mib=256, failure_value=-1.0, workers=2)
PATIENT = RewardLimits(seconds=120.0, memory_mib=256, failure_value=-1.0, workers=2)


def length(completions: Sequence[str], **columns: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def obey(completions: Sequence[str], **columns: Any) -> Any:
    """Do what each completion says."""
    values: list[Any] = []
    for text in completions:
        match text.split():
            case ["log", file, *rest]:
                with open(file, "a") as log:
                    log.write(f"{os.getpid()}\n")
                values += obey([" ".join(rest)])
            case ["nice", *rest]:
                os.nice(10)
                values += obey([" ".join(rest)])
            case ["thread", *rest]:
                thread = threading.Thread(target=obey, args=([" ".join(rest)],))
                thread.start()
                thread.join()
                values.append(1.0)
            case ["sleep"]:
                time.sleep(1000)
            case ["compute"]:
                values.append(10 ** (10**10))
            case ["fill"]:
                values.append(len(bytearray(8 << 30)))
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
                Path(file).write_text(" ".join(str(child.pid) for child in children))
                children[0].wait()
            case ["object"]:
                values.append(object())
            case ["nan"]:
                values.append(float("nan"))
            case ["text"]:
                values.append("one")
            case ["none"]:
                values.append(None)
            case _:
                values.append(1.0)
    return values


class Whole:
    """Needs the batch."""

    needs_batch = True

    def __call__(self, completions: Sequence[str], **columns: Any) -> list[float]:
        return [len(completions) - rank for rank, _ in enumerate(completions)]


def is_alive(process: int) -> bool:
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rsplit(")", 1)[1].split()[0] != "Z"


def wait_until(is_so: Callable[[], bool], seconds: float = 60.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not is_so():
        time.sleep(0.05)
    return is_so()
