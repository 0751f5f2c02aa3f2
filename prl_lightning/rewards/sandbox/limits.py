"""The limits of a call of a reward function, the call, and its outcome."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from prl_lightning.rewards.sandbox.cores import usable_cores


@dataclass(frozen=True)
class RewardLimits:
    """Limits of a reward function's call. A call that exceeds them is killed and counts as failed.

    Two clocks time each call. One adds up the processor time of the call's process and of every
    process that it started. The other runs while the call waits: none of these processes is running
    or ready to run, as in a sleep, a deadlock or a request over the network. Neither clock runs
    while the call is ready to run and has no core, so a busy machine fails no call. A call may
    compute for `seconds`, and it may wait for twice as long.

    Calls run in two passes, so that calls that hang delay the others only a little. In the first
    pass each clock has a short limit: three times the longest call of the function that has
    returned so far, and at least a tenth of `seconds`. (Until one has returned, calls have the full
    limit.) Calls that exceed the short limit run again under the full limit after all others. The
    second pass ends early once max(2, workers) calls in a row have exceeded the full limit. The
    remaining calls then fail without a second run.

    A call whose process dies (a crash, an exit, the out-of-memory killer) runs again once, in a new
    process. So does a call that runs out of memory, since earlier calls may have kept some of it.

    Processor time and memory are only measured on Linux. On other systems a call always counts as
    waiting.

    Attributes:
        seconds: Processor time for one completion, in seconds. A call with several completions gets
            as much for each.
        memory_mib: What a process may allocate in addition to what the loaded functions take, in
            MiB. If a function catches the MemoryError itself, the call fails only if
            small objects filled the memory.
        failure_value: The reward of a completion whose call failed.
        max_failures: The run stops when more than this share of the completions of an iteration, or
            of an evaluation set, failed.
        import_seconds: How long the functions may take to load. What a call imports counts here
            and not as its time. The run stops if it takes longer.
        workers: Processes per rank; one per core by default. Functions that wait, as for a network,
            can use more processes than cores. 0 calls the functions in the trainer's process,
            for those that need its memory: with all completions at once and without limits. An
            exception then stops the run.

    Raises:
        ValueError: If a value is out of range.
    """

    seconds: float = 5.0
    memory_mib: int = 1024
    failure_value: float = 0.0
    max_failures: float = 0.25
    workers: int | None = None
    import_seconds: float = 300.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name, fits, range_ in (
            ("seconds", 0 < self.seconds < float("inf"), "above 0 and finite"),
            ("memory_mib", self.memory_mib > 0, "above 0"),
            ("import_seconds", 0 < self.import_seconds < float("inf"), "above 0 and finite"),
            ("failure_value", abs(self.failure_value) < float("inf"), "finite"),
            ("max_failures", 0 <= self.max_failures <= 1, "a share between 0 and 1"),
            ("workers", self.workers is None or self.workers >= 0, "0 or more"),
        ):
            if not fits:
                raise ValueError(f"limits.{name}={getattr(self, name)}: must be {range_}.")

    def processes(self, ranks: int) -> int:
        """Return how many processes a rank starts.

        Args:
            ranks: Number of ranks on this machine, which share its cores.
        """
        return self.workers or max(1, usable_cores() // ranks)


@dataclass(frozen=True)
class Task:
    """One call of a reward function.

    Attributes:
        function: Index of the function.
        method: `__call__`, or the name of another method.
        arguments: Keyword arguments.
        seconds: Limit of its processor time.
        seed: Seeds the call's random numbers, so that a resumed run draws the same ones.
    """

    function: int
    method: str
    arguments: dict[str, Any]
    seconds: float
    seed: int = 0


@dataclass(frozen=True)
class Failure:
    """Why a call returned nothing.

    Attributes:
        kind: `time`, `import`, `memory`, `died`, or the name of the exception.
        message: The details.
        traceback: The exception's traceback, else empty.
    """

    kind: str
    message: str
    traceback: str = ""


@dataclass(frozen=True)
class Reply:
    """The outcome of a task.

    Attributes:
        values: What the function returned, arrays as lists.
        failures: The function's attribute `failures` after the call.
        failure: Why there are no values, or `None`.
    """

    values: Any = None
    failures: int = 0
    failure: Failure | None = None


DIED = Failure("died", "its process died twice: a crash, an exit, or the out-of-memory killer")
