"""Start a real vLLM server with the command that docs/engines.md has for a CPU."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lightning.fabric.plugins.environments.lightning import find_free_network_port

PAGE = Path(__file__).parents[2] / "docs" / "engines.md"


def documented(**options: str) -> list[str]:
    """The words of the command, with other values of its options."""
    found = re.search(r"```\n(VLLM_SERVER_DEV_MODE=1 python .*?)```", PAGE.read_text(), re.DOTALL)
    assert found is not None
    words = shlex.split(found[1].replace("\\\n", " "))
    for name, value in options.items():
        words[words.index("--" + name.replace("_", "-")) + 1] = value
    return words


@contextmanager
def vllm_server(model: str, max_model_len: int, log: Path) -> Iterator[str]:
    """Yield the URL of a server that is starting, on loopback."""
    port = str(find_free_network_port())
    variable, _, *words = documented(
        model=model, port=port, max_model_len=str(max_model_len), kv_cache_memory_bytes="100M"
    )
    name, _, value = variable.partition("=")
    with log.open("w") as file:
        server = subprocess.Popen(
            [sys.executable, *words],
            env=os.environ | {name: value, "VLLM_NO_USAGE_STATS": "1"},
            cwd=log.parent,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            with suppress(subprocess.TimeoutExpired):
                server.wait(timeout=60)
            end_group(server.pid)
            server.wait()


def end_group(leader: int) -> None:
    """Kill processes that have not ended by themselves; the last one frees shared memory."""
    with suppress(ProcessLookupError):
        for _ in range(100):
            os.killpg(leader, 0)
            time.sleep(0.1)
        os.killpg(leader, signal.SIGKILL)
