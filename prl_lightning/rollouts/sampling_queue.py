"""SamplingQueue: samplings that run one after the other in a thread while the trainer trains."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from prl_lightning.sampling import SamplingConfig
from prl_lightning.sampling.sample_cache import prompt_key
from prl_lightning.types import Completion, Prompt


@dataclass(frozen=True)
class Samples:
    """Completions of some prompts.

    Attributes:
        prompts: what was completed; with environments, with the text that they added.
        groups: completions of each prompt.
        config: settings of the sampling.
        step: ``trainer.global_step`` of the weights that sampled them.
        seconds: duration of the sampling.
    """

    prompts: list[Prompt]
    groups: list[list[Completion]]
    config: SamplingConfig
    step: int
    seconds: float


@dataclass(frozen=True)
class Job:
    """A sampling that is queued, running or finished.

    Attributes:
        prompts: to complete.
        config: settings of the sampling.
        future: its samples.
    """

    prompts: list[Prompt]
    config: SamplingConfig
    future: Future[Samples]


class SamplingQueue:
    """Jobs of one engine, in the order of the iterations that train on them."""

    def __init__(self) -> None:
        self._jobs: deque[Job] = deque()
        self._thread: ThreadPoolExecutor | None = None

    def __len__(self) -> int:
        """Return the number of jobs that no iteration has taken."""
        return len(self._jobs)

    def put(
        self, prompts: list[Prompt], config: SamplingConfig, work: Callable[[], Samples]
    ) -> None:
        """Add a job and return at once."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prl-engine")
        self._jobs.append(Job(prompts, config, self._thread.submit(work)))

    def take(self, prompts: list[Prompt], config: SamplingConfig) -> Samples:
        """Wait for the oldest job and remove it.

        Args:
            prompts: of the iteration that trains on it.
            config: see ``prompts``.

        Raises:
            RuntimeError: the job failed, or it has other prompts or settings.
        """
        job = self._jobs.popleft()
        # Of the prompts what the engine reads: columns may hold NaN, which is not equal to itself.
        asked, queued = (list(map(prompt_key, some)) for some in (prompts, job.prompts))
        if (queued, job.config) != (asked, config):
            raise RuntimeError(
                f"rollout.overlap: the {len(prompts)} prompts of an iteration, or their "
                "SamplingConfig, are not those that were sampled ahead for it. Set "
                "rollout.max_staleness=1 if a source in data.train chooses rows by rewards; "
                "otherwise set rollout.overlap=false."
            )
        return job.future.result()

    def wait(self) -> None:
        """Wait until the engine is idle; the jobs can still be taken.

        Raises:
            RuntimeError: a job failed.
        """
        for job in self._jobs:
            job.future.result()

    def cancel(self) -> None:
        """Forget all jobs. Does not wait for the running one, which ends with the engine."""
        self._jobs.clear()
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)
            self._thread = None
