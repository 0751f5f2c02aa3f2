"""Calling reward functions: in this process, or in workers within limits."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prl_lightning.rewards.protocol import RewardFunction, accepted, checked_rewards
from prl_lightning.rewards.tasks import Failure, Reply, RewardLimits, Task

Functions = Mapping[str, RewardFunction]


@dataclass(frozen=True)
class FailedCall:
    """A call of a reward function that gave nothing.

    Attributes:
        name: The function's.
        index: The completion's, of those scored together.
        failure: Why.
    """

    name: str
    index: int
    failure: Failure


@dataclass(frozen=True)
class Judged:
    """What functions gave B completions.

    Attributes:
        parts: B rewards by the function's name, NaN where it does not apply.
        failures: By name, how many completions could not be judged.
        failed_calls: Those that raised, or were killed.
    """

    parts: dict[str, list[float]]
    failures: dict[str, int]
    failed_calls: tuple[FailedCall, ...] = ()


def call_here(functions: Functions, arguments: Mapping[str, Any], size: int) -> Judged:
    """Call each function once, with all completions.

    Args:
        functions: By name.
        arguments: Prompts, completions and columns, `size` values each.
        size: B.

    Raises:
        ValueError: If one returns something that is not B finite numbers or `None`.
        RuntimeError: If one raises; its error is the cause.
    """
    parts, failures = {}, {}
    for name, function in functions.items():
        parts[name] = checked_rewards(name, _call(name, function, arguments), size)
        failures[name] = int(getattr(function, "failures", 0))
    return Judged(parts, failures)


def call_in_workers(
    functions: Functions,
    arguments: Mapping[str, Any],
    size: int,
    limits: RewardLimits,
    run: Callable[[Sequence[Task]], list[Reply]],
) -> Judged:
    """Call each function with one completion at a time, or with all if it needs them.

    Args:
        functions: By name, in the order in which the workers know them.
        arguments: Prompts, completions and columns, `size` values each.
        size: B.
        limits: Of a call, and what its failure is worth.
        run: Carries tasks out.
    """
    calls: list[tuple[str, range, Task]] = []
    first_seed = random.getrandbits(31)  # from a state that checkpoints keep
    for index, (name, function) in enumerate(functions.items()):
        own, whole = accepted(function, arguments), range(size)
        needs_batch = getattr(function, "needs_batch", False)
        for rows in [whole] if needs_batch else [whole[row : row + 1] for row in whole]:
            part = {key: [values[row] for row in rows] for key, values in own.items()}
            seed, seconds = first_seed + len(calls), limits.seconds * len(rows)
            calls.append((name, rows, Task(index, "__call__", part, seconds, seed)))

    parts = {name: [limits.failure_value] * size for name in functions}
    failures = dict.fromkeys(functions, 0)
    failed: list[FailedCall] = []
    for (name, rows, _), reply in zip(calls, run([task for *_, task in calls]), strict=True):
        values, failure = _checked(name, reply, len(rows))
        failures[name] += reply.failures + (len(rows) if failure else 0)
        if failure:
            failed += [FailedCall(name, row, failure) for row in rows]
        else:
            parts[name][rows.start : rows.stop] = values
    return Judged(parts, failures, tuple(failed))


def _checked(name: str, reply: Reply, size: int) -> tuple[list[float], Failure | None]:
    if reply.failure:
        return [], reply.failure
    try:
        return checked_rewards(name, reply.values, size), None
    except ValueError as error:
        return [], Failure("ValueError", str(error))


def _call(name: str, function: RewardFunction, arguments: Mapping[str, Any]) -> Any:
    own = accepted(function, arguments)
    try:
        return function(**own)
    except Exception as error:
        raise RuntimeError(
            f"reward function '{name}' raised {type(error).__name__}: {error}. It was called with "
            f"{len(arguments['completions'])} completions and {sorted(own)}; mend it so that it "
            "returns a number, or None where it does not apply, for every completion"
        ) from error
