"""GymTask: a task of reasoning-gym, and checks that it has the parameters and levels."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any

from prl_lightning.data.format import DataError

CHUNK = 1000  # rows of one of reasoning-gym's datasets; some prepare all of them at once

# Their rows depend on the order of sets, which Python changes from process to process.
HASH_ORDERED = frozenset({
    "isomorphic_strings", "knight_swap", "polynomial_multiplication", "ransom_note", "word_ladder",
})  # fmt: skip


@dataclass(frozen=True)
class GymTask:
    """A task of a mixture.

    Attributes:
        weight: rows are drawn in proportion to it.
        config: parameters of the task, such as ``{min_digits: 1, max_digits: 2}``.
        level: of the task's curriculum, from 0. It sets the parameters that the curriculum has; the
            ranges of a level include the easier levels. With ``curriculum`` it is the first level.
    """

    weight: float = 1.0
    config: dict[str, Any] = field(default_factory=dict)
    level: int | None = None


def check_task(name: str, task: GymTask, moves: bool) -> None:
    """Check a task, its parameters and its levels.

    Args:
        name: of the task.
        task: its settings.
        moves: whether a curriculum may move it to any level.

    Raises:
        DataError: reasoning-gym does not have them.
    """
    from reasoning_gym.factory import DATASETS

    if name == "composite":
        raise DataError("ReasoningGym: the task 'composite' is a mixture: name its tasks instead.")
    if name not in DATASETS:
        raise DataError(f"ReasoningGym: there is no task {name!r}. {_nearest(name, DATASETS)}")
    if not 0 < task.weight < float("inf"):
        raise DataError(f"ReasoningGym: {name} has weight={task.weight}: must be above 0.")
    if name in HASH_ORDERED and sys.flags.hash_randomization:
        raise DataError(
            f"ReasoningGym: the rows of the task {name!r} differ from process to process, so a run "
            "could not be continued. Set the environment variable PYTHONHASHSEED=0, or leave the "
            "task out."
        )
    known = {parameter.name for parameter in fields(DATASETS[name][1])} - {"seed", "size"}
    for parameter in task.config.keys() - known:
        raise DataError(
            f"ReasoningGym: the task {name!r} has no parameter {parameter!r} in config. "
            f"{_nearest(parameter, known)}"
        )
    for level in _levels(name, task, moves):
        _check_config(name, task, level)


def _levels(name: str, task: GymTask, moves: bool) -> Sequence[int | None]:
    """Return the levels that a task may have."""
    from reasoning_gym.factory import has_curriculum

    if task.level is None:
        return [None]
    if not has_curriculum(name):
        raise DataError(f"ReasoningGym: {name} has level={task.level}, but no levels.")
    highest = highest_level(name)
    if not 0 <= task.level <= highest:
        raise DataError(
            f"ReasoningGym: {name} has level={task.level}: must be between 0 and {highest}."
        )
    return range(highest + 1) if moves else [task.level]


def _check_config(name: str, task: GymTask, level: int | None) -> None:
    at = "" if level is None else f" at level {level}"
    if level is not None and (twice := _set_by_levels(name) & task.config.keys()):
        raise DataError(
            f"ReasoningGym: the task {name!r} has {sorted(twice)} in config, which its level sets. "
            "Leave out one of them."
        )
    try:
        config = task_config(name, task, level)
        if hasattr(config, "validate"):  # two tasks lack it
            config.validate()
    except Exception as error:  # an AssertionError as a rule
        raise DataError(
            f"ReasoningGym: config={task.config} of the task {name!r}{at} is refused: "
            f"{error or type(error).__name__}."
        ) from error


def task_config(name: str, task: GymTask, level: int | None) -> Any:
    """Return reasoning-gym's configuration of a task."""
    from reasoning_gym.factory import DATASETS, create_curriculum

    given = {**task.config, "seed": 0, "size": CHUNK}
    if level is None:
        return DATASETS[name][1](**given)
    curriculum = create_curriculum(name)
    curriculum.set_global_level(level)
    return curriculum.generate_configuration(given)


def parameters(config: Any) -> dict[str, Any]:
    """Return the parameters of reasoning-gym's configuration of a task."""
    names = {parameter.name for parameter in fields(config)} - {"seed", "size"}
    return {name: getattr(config, name) for name in sorted(names)}


def highest_level(name: str) -> int:
    """Return the highest level of a task's curriculum."""
    from reasoning_gym.factory import create_curriculum

    attributes = create_curriculum(name).attributes.values()
    return max((len(attribute.levels) for attribute in attributes), default=1) - 1


def _set_by_levels(name: str) -> set[str]:
    from reasoning_gym.factory import create_curriculum

    attributes = create_curriculum(name).attributes.values()
    keys = ("field_name", "lower_field_name", "upper_field_name")
    return {getattr(one, key) for one in attributes for key in keys if hasattr(one, key)}


def _nearest(name: str, known: Collection[str]) -> str:
    close = get_close_matches(name, known, n=3, cutoff=0.0)
    return f"The nearest are {', '.join(close)}." if close else "It has none."
