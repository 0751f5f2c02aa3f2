"""Start a real vLLM server, as docs/engines.md says."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning.fabric.plugins.environments.lightning import find_free_network_port


@contextmanager
def vllm_server(model: str, max_model_len: int, log: Path) -> Iterator[str]:
    """Yield the URL of a server that is starting, on loopback."""
    port = find_free_network_port()
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", model, "--host", "127.0.0.1", "--port", str(port)),
        *("--dtype", "float32", "--enforce-eager", "--no-enable-chunked-prefill"),
        *("--block-size", "32", "--max-model-len", str(max_model_len)),
        *("--kv-cache-memory-bytes", "100M", "--logprobs-mode", "processed_logprobs"),
    ]
    variables = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with log.open("w") as file:
        server = subprocess.Popen(
            command,
            env=os.environ | variables,
            cwd=log.parent,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(server.pid, signal.SIGKILL)  # with its engine's processes
            server.wait()
