"""What the fork server imports before it forks: most of a process's start, the engine included."""

import atexit
import gc
import os


def import_all() -> None:
    """Import the command line, and what VLLMSampler imports when it starts."""
    import prl_lightning.cli.lightning  # noqa: F401
    from prl_lightning.sampling import VLLMSampler

    VLLMSampler()._set_environment()

    import vllm.v1.executor.uniproc_executor
    import vllm.v1.worker.cpu_worker  # noqa: F401
    from vllm import LLM  # noqa: F401


gc.disable()  # imports are no garbage, and looking for it takes a sixth of their time
import_all()
gc.enable()
# Triton's bindings list what they leak where an interpreter ends. Children end without it anyway.
atexit.register(os._exit, 0)
