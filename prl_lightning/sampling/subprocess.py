"""An engine in a process of its own, so that it can sample while the trainer trains."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing import connection, parent_process
from threading import Thread
from typing import Any

import torch
from torch import Tensor, multiprocessing

from prl_lightning.sampling.base import Progress, Sampler, SamplingConfig, local_rank
from prl_lightning.sampling.vllm import VLLMSampler
from prl_lightning.types import Completion, Prompt

SECONDS_BETWEEN_REPORTS = 0.2


class SubprocessSampler(Sampler):
    """Run another sampler in a process of its own, with GPUs of its own.

    Weights are handed over in shared memory and everything else through a pipe; no port is opened.
    The process ends with ``stop``, and by itself when the trainer's process has ended, however that
    happened.

    Args:
        sampler: the engine; vLLM by default.
        gpus: one for each of the trainer's processes on a machine, by its local rank, counted among
            those that the trainer sees; the engine sees this one alone. By default, all of them.
    """

    is_concurrent = True

    def __init__(self, sampler: Sampler | None = None, gpus: Sequence[int] = ()) -> None:
        self.sampler = VLLMSampler() if sampler is None else sampler
        self.dtype = self.sampler.dtype
        self.reads_files = self.sampler.reads_files
        self.gpus = gpus
        self._pool: ProcessPoolExecutor | None = None
        self._process_id: int | None = None

    def follow(self, precision: str) -> None:
        """See ``Sampler.follow``: what the engine in the process follows."""
        self.sampler.follow(precision)
        self.dtype = self.sampler.dtype

    def identity(self) -> str:
        """See ``Sampler.identity``: that of the engine in the process."""
        return self.sampler.identity()

    def missing_requirements(self) -> list[str]:
        """See ``Sampler.missing_requirements``: GPUs, and what the engine in the process says."""
        seen = torch.cuda.device_count()
        missing = self.sampler.missing_requirements()
        if any(gpu >= seen for gpu in self.gpus):
            missing.append(
                f"SubprocessSampler.gpus={list(self.gpus)}, but this process sees {seen} GPUs, "
                "counted from 0. Name others, or leave gpus out."
            )
        return missing

    def start(self, model: str, max_model_tokens: int) -> None:
        """See ``Sampler.start``.

        Raises:
            ValueError: there are fewer ``gpus`` than processes on this machine, or one of them is
                not seen.
        """
        environment = {}
        if self.gpus:
            rank = local_rank()
            if rank >= len(self.gpus):
                raise ValueError(
                    f"SubprocessSampler.gpus={list(self.gpus)} has none for local rank {rank}. "
                    "Name one GPU for each of the trainer's processes on a machine."
                )
            environment["CUDA_VISIBLE_DEVICES"] = _of_machine(self.gpus[rank])
        self._told, teller = multiprocessing.Pipe(duplex=False)
        self._pool = ProcessPoolExecutor(
            max_workers=1,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_begin,
            initargs=(self.sampler, environment, teller),
        )
        self._process_id = self._in_process(os.getpid)
        self._in_process(_call, "start", model, max_model_tokens)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """See ``Sampler.load_weights``."""
        # Copies, because what is sent moves to shared memory: the policy's own must not.
        sent = [(name, tensor.detach().to("cpu", copy=True)) for name, tensor in weights]
        self._in_process(_call, "load_weights", sent)

    def generate(
        self, prompts: Sequence[Prompt], config: SamplingConfig, on_progress: Progress | None = None
    ) -> list[list[Completion]]:
        """See ``Sampler.generate``."""

        def report() -> None:
            while on_progress is not None and self._told.poll():
                on_progress(*self._told.recv())

        tells = on_progress is not None
        groups: list[list[Completion]] = self._in_process(
            _generate, prompts, config, tells, meanwhile=report
        )
        return groups

    def stop(self) -> None:
        """See ``Sampler.stop``; what is being drawn is dropped."""
        if self._pool is not None:
            if self._process_id is not None:
                with suppress(ProcessLookupError):  # it has ended by itself
                    os.kill(self._process_id, signal.SIGKILL)
            self._pool.shutdown(cancel_futures=True)
            self._pool = self._process_id = None

    def _in_process(
        self, function: Any, *args: Any, meanwhile: Callable[[], None] = lambda: None
    ) -> Any:
        if self._pool is None:
            raise RuntimeError("the sampler is not started: call start() first")
        try:
            result = self._pool.submit(function, *args)
            while not wait([result], timeout=SECONDS_BETWEEN_REPORTS).done:
                meanwhile()
            meanwhile()
            return result.result()
        except BrokenProcessPool as error:
            raise RuntimeError(
                f"the process of {type(self.sampler).__name__} has ended while it was needed. Its "
                "last words are above; without any it was killed, mostly for memory."
            ) from error


def _of_machine(gpu: int) -> str:
    """A GPU as the machine counts them, of which this process may see only some."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not visible:
        return str(gpu)
    if gpu >= len(visible.split(",")):
        raise ValueError(
            f"SubprocessSampler.gpus has {gpu}, but CUDA_VISIBLE_DEVICES={visible}. They are "
            "counted from 0 among these."
        )
    return visible.split(",")[gpu]


# In the other process

_sampler: Sampler
_teller: connection.Connection


def _begin(sampler: Sampler, environment: dict[str, str], teller: connection.Connection) -> None:
    global _sampler, _teller
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's to answer
    _sampler, _teller = sampler, teller
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _generate(
    prompts: Sequence[Prompt], config: SamplingConfig, tells: bool
) -> list[list[Completion]]:
    return _sampler.generate(prompts, config, _tell if tells else None)


def _tell(prompts: int, tokens: int) -> None:
    _teller.send((prompts, tokens))


def _call(method: str, *args: Any) -> Any:
    return getattr(_sampler, method)(*args)
