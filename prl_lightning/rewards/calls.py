"""Call reward functions, in this process or in the sandbox."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prl_lightning.rewards.protocol import RewardFunction, accepted, awaited, checked_rewards
from prl_lightning.rewards.sandbox.limits import Failure, Reply, RewardLimits, Task

Functions = Mapping[str, RewardFunction]


@dataclass(frozen=True)
class FailedCall:
    """A call of a reward function that returned no reward.

    Attributes:
        name: Name of the function.
        index: Index of the completion, among those scored together.
        failure: The reason.
    """

    name: str
    index: int
    failure: Failure


@dataclass(frozen=True)
class Judged:
    """The unweighted rewards of B completions.

    Attributes:
        parts: B rewards by name of the function, NaN where it does not apply.
        failures: By name, how many completions the function could not judge.
        failed_calls: The calls that raised or were killed.
    """

    parts: dict[str, list[float]]
    failures: dict[str, int]
    failed_calls: list[FailedCall] = field(default_factory=list)


def call_here(functions: Functions, arguments: Mapping[str, Any], size: int) -> Judged:
    """Call each function once, with all completions, in this process.

    Args:
        functions: The functions by name.
        arguments: Prompts, completions and columns, `size` values each.
        size: Number of completions, B.

    Raises:
        ValueError: A function returned something other than B finite numbers or `None`.
        RuntimeError: A function raised; its exception is the cause.
    """
    parts, failures = {}, {}
    for name, function in functions.items():
        parts[name] = checked_rewards(name, _call(name, function, arguments), size)
        failures[name] = int(getattr(function, "failures", 0))
    return Judged(parts, failures)


def call_in_sandbox(
    functions: Functions,
    arguments: Mapping[str, Any],
    size: int,
    limits: RewardLimits,
    run: Callable[[Sequence[Task]], list[Reply]],
) -> Judged:
    """Call each function with one completion at a time, or with all if it needs the batch.

    Args:
        functions: The functions by name, in the sandbox's order.
        arguments: Prompts, completions and columns, `size` values each.
        size: Number of completions, B.
        limits: Limits of one completion, and the reward of a failed call.
        run: Runs tasks.
    """
    calls: list[tuple[str, range, Task]] = []
    first_seed = random.getrandbits(31)  # from the state that checkpoints save
    for index, (name, function) in enumerate(functions.items()):
        own, whole = accepted(function, arguments), range(size)
        needs_batch = getattr(function, "needs_batch", False)
        for rows in [whole] if needs_batch else [whole[row : row + 1] for row in whole]:
            part = {key: [values[row] for row in rows] for key, values in own.items()}
            seed, seconds = first_seed + len(calls), limits.seconds * len(rows)
            calls.append((name, rows, Task(index, "__call__", part, seconds, seed)))

    judged = Judged(
        {name: [limits.failure_value] * size for name in functions}, dict.fromkeys(functions, 0)
    )
    for (name, rows, _), reply in zip(calls, run([task for *_, task in calls]), strict=True):
        values, failure = _checked(name, reply, len(rows))
        judged.failures[name] += reply.failures
        if failure is None:
            judged.parts[name][rows.start : rows.stop] = values
        else:
            judged.failures[name] += len(rows)
            judged.failed_calls.extend(FailedCall(name, row, failure) for row in rows)
    return judged


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
        return awaited(function(**own))
    except Exception as error:
        raise RuntimeError(
            f"reward function '{name}' raised {type(error).__name__}: {error}. It was called with "
            f"{len(arguments['completions'])} completions and {sorted(own)}; fix it to return a "
            "number, or None where it does not apply, for every completion"
        ) from error
