"""A call of a reward function, what it may take, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class RewardLimits:
    """What a reward function may take, before its process is killed and the call is a failure.

    A call that has computed for half as long again as any of the last 1,024 calls of its function
    (and for a twentieth of a second) lets others go first, so that one that never ends does not
    stall them. If its time ends meanwhile, it is tried again after all others, with a core to
    itself; not so if as many before it as there are workers (and at least two) were in vain.

    Attributes:
        seconds: Wall clock, for one completion.
        memory_mib: What a worker may take beyond what loading the functions has taken (on Linux).
            An error that a function has caught itself is seen where small things took the memory.
        failure_value: The reward that a failed call gives its completion.
        max_failures: The run stops when more than this share of an iteration's completions failed.
        workers: Processes of each rank; by default one a core. 0 calls the functions in the
            trainer's process, for those that need its memory: with all completions at once, without
            any limit, and an exception stops the run.

    Raises:
        ValueError: If one of them is out of its range.
    """

    seconds: float = 5.0
    memory_mib: int = 1024
    failure_value: float = 0.0
    max_failures: float = 0.25
    workers: int | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name, fits, range_ in (
            ("seconds", 0 < self.seconds < float("inf"), "above 0 and finite"),
            ("memory_mib", self.memory_mib > 0, "above 0"),
            ("failure_value", abs(self.failure_value) < float("inf"), "finite"),
            ("max_failures", 0 <= self.max_failures <= 1, "a share between 0 and 1"),
            ("workers", self.workers is None or self.workers >= 0, "0 or more"),
        ):
            if not fits:
                raise ValueError(f"limits.{name}={getattr(self, name)}: must be {range_}.")


@dataclass(frozen=True)
class Task:
    """One call of a reward function.

    Attributes:
        function: Which of the functions.
        method: `__call__`, or another of its methods.
        arguments: By keyword.
        seconds: Wall-clock limit.
        seed: Of what the call draws at random, so that a run that is continued draws the same.
    """

    function: int
    method: str
    arguments: dict[str, Any]
    seconds: float
    seed: int = 0


@dataclass(frozen=True)
class Failure:
    """Why a call gave nothing.

    Attributes:
        kind: `time`, `memory`, `died`, or the name of the exception.
        message: For people.
        traceback: Of an exception, else empty.
    """

    kind: str
    message: str
    traceback: str = ""


@dataclass(frozen=True)
class Reply:
    """What came of a task.

    Attributes:
        values: What the function returned, arrays as lists.
        failures: Its attribute of that name after the call.
        failure: Why there are no values, or `None`.
        used: Seconds of a core that the call took.
    """

    values: Any = None
    failures: int = 0
    failure: Failure | None = None
    used: float = 0.0


DIED = Failure(
    "died", "its process has died twice: a crash, an exit, or the system's out-of-memory killer"
)
