"""SubprocessSampler: an engine in another process, so that it samples while the trainer trains."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import connection, parent_process
from multiprocessing.process import BaseProcess
from threading import Thread
from types import ModuleType
from typing import Any

import cloudpickle
import torch
from torch import Tensor, multiprocessing

from prl_lightning.sampling.base import Progress, Sampler, SamplingConfig, local_rank
from prl_lightning.sampling.vllm import VLLMSampler
from prl_lightning.types import Completion, Prompt


class SubprocessSampler(Sampler):
    """Run another sampler in a subprocess, with its own GPUs.

    Weights are passed in shared memory and everything else through a pipe; no port is opened. The
    subprocess ends at ``stop`` and when the trainer's process ends, for any reason.

    Args:
        sampler: the engine; vLLM by default.
        gpus: the engine's GPU for each of the trainer's processes on a machine, by local rank and
            counted among the GPUs that the trainer sees. The engine sees only this one. By default,
            it sees all GPUs.

    Raises:
        ValueError: the engine belongs to several ranks.
    """

    is_concurrent = loads_in_thread = True

    def __init__(self, sampler: Sampler | None = None, gpus: Sequence[int] = ()) -> None:
        self.sampler = VLLMSampler() if sampler is None else sampler
        if self.sampler.ranks_per_engine > 1:
            raise ValueError(
                "rollout.sampler is SubprocessSampler, whose sampler has tensor_parallel_size="
                f"{self.sampler.ranks_per_engine}. A subprocess has the engine of one rank. Leave "
                "SubprocessSampler out, or set tensor_parallel_size=1."
            )
        self.dtype = self.sampler.dtype
        self.reads_files = self.sampler.reads_files
        self.gpus = gpus
        self._process: BaseProcess | None = None

    def follow(self, precision: str, on_gpu: bool | None = None) -> None:
        """See ``Sampler.follow``."""
        self.sampler.follow(precision, on_gpu)
        self.dtype = self.sampler.dtype

    def identity(self) -> str:
        """See ``Sampler.identity``: it is that of the engine."""
        return self.sampler.identity()

    def missing_requirements(self) -> list[str]:
        """See ``Sampler.missing_requirements``: GPUs, and the requirements of the engine."""
        seen = torch.cuda.device_count()
        missing = self.sampler.missing_requirements()
        if any(gpu >= seen for gpu in self.gpus):
            missing.append(
                f"SubprocessSampler.gpus={list(self.gpus)}, but this process sees {seen} GPUs, "
                "counted from 0. Choose among these, or remove gpus."
            )
        return missing

    def refuse_model(self, model: str, max_model_tokens: int) -> None:
        """See ``Sampler.refuse_model``: it is that of the engine."""
        self.sampler.refuse_model(model, max_model_tokens)

    def start(self, model: str, max_model_tokens: int) -> None:
        """See ``Sampler.start``.

        Raises:
            ValueError: see ``missing_requirements``; or ``gpus`` has no entry for this process.
        """
        if missing := self.missing_requirements():
            raise ValueError(" ".join(missing))
        environment = {}
        if self.gpus:
            rank = local_rank()
            if rank >= len(self.gpus):
                raise ValueError(
                    f"SubprocessSampler.gpus={list(self.gpus)} has no entry for local rank {rank}. "
                    "List one GPU for each of the trainer's processes on a machine."
                )
            visible, gpu = os.environ.get("CUDA_VISIBLE_DEVICES"), self.gpus[rank]
            environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[gpu] if visible else str(gpu)
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        sampler = cloudpickle.dumps(self.sampler)  # with classes that only the program has
        process = context.Process(target=_serve, args=(sampler, environment, theirs))
        with _hidden_program():
            process.start()
        self._process = process
        atexit.register(self.stop)  # multiprocessing would wait for the subprocess at exit
        theirs.close()  # only the subprocess holds this end now, so its death is an EOF here
        self._call("start", model, max_model_tokens)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """See ``Sampler.load_weights``."""
        # Send copies: sending moves a tensor to shared memory.
        self._call("load_weights", self.copy_weights(weights))

    def generate(
        self, prompts: Sequence[Prompt], config: SamplingConfig, on_progress: Progress | None = None
    ) -> list[list[Completion]]:
        """See ``Sampler.generate``."""
        return self._call("generate", prompts, config, on_progress=on_progress)

    def stop(self) -> None:
        """See ``Sampler.stop``: kill the subprocess, also while it samples."""
        process, self._process = self._process, None
        if process is not None:
            atexit.unregister(self.stop)
            process.kill()
            process.join()

    def _call(self, method: str, *args: Any, on_progress: Progress | None = None) -> Any:
        """Call a method of the engine; raise its exceptions here."""
        kind, value = self._exchange(method, args, on_progress is not None)
        while kind == "progress":
            if on_progress is not None:
                on_progress(*value)
            kind, value = self._exchange()
        if kind == "error":
            raise value
        return value

    def _exchange(self, *request: Any) -> tuple[str, Any]:
        """Send a request, if any, and return the next message of the subprocess."""
        if self._process is None:
            raise RuntimeError("SubprocessSampler is not started: call start() first.")
        try:
            if request:
                self._pipe.send(request)
            return self._pipe.recv()
        except (EOFError, OSError) as error:
            raise RuntimeError(
                f"the subprocess of {type(self.sampler).__name__} ended. See its traceback above; "
                "without a traceback it was killed, most likely because memory ran out."
            ) from error


@contextmanager
def _hidden_program() -> Iterator[None]:
    """Keep a subprocess from running the program again to find the classes that it defines.

    A program from stdin is no file, and one without ``if __name__ == "__main__"`` would train.
    """
    program, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = program


def _serve(pickled: bytes, environment: dict[str, str], pipe: connection.Connection) -> None:
    """Answer requests until the parent process ends; runs in the subprocess."""
    os.environ.update(environment)
    sampler: Sampler = cloudpickle.loads(pickled)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the trainer handles Ctrl-C
    Thread(target=_exit_with_parent, daemon=True).start()
    with suppress(EOFError):
        while True:
            _answer(sampler, pipe)


def _exit_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _answer(sampler: Sampler, pipe: connection.Connection) -> None:
    """Answer one request; a function, so that weights in shared memory are freed at its end."""
    method, args, reports_progress = pipe.recv()
    if reports_progress:
        args = (*args, lambda *numbers: pipe.send(("progress", numbers)))
    try:
        message = ("result", getattr(sampler, method)(*args))
    except Exception as error:
        error.add_note(traceback.format_exc())  # a pickled exception loses its traceback
        message = ("error", error)
    pipe.send(message)
