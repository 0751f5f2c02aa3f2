"""ReasoningGym: the procedural tasks of reasoning-gym as a source of prompts."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng

from prl_lightning.data.format import DataError
from prl_lightning.data.gym_tasks import (
    CHUNK,
    GymTask,
    check_task,
    highest_level,
    parameters,
    task_config,
)
from prl_lightning.distributed import sum_over_ranks
from prl_lightning.types import PromptSource, Rollout

LARGEST = 2_000_000  # with a thousand attempts, seed + index of a row stays below 2^32


@dataclass(frozen=True)
class Curriculum:
    """When the level of a task changes.

    Attributes:
        iterations: so many iterations at a level are averaged before it changes.
        raise_above: a task whose mean reward is above this gets the next level.
        lower_below: a task whose mean reward is below this gets the previous level.

    Raises:
        ValueError: a value is out of range.
    """

    iterations: int = 5
    raise_above: float = 0.8
    lower_below: float = 0.2

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.iterations < 1:
            raise ValueError(f"curriculum.iterations={self.iterations}: must be at least 1.")
        if self.lower_below >= self.raise_above:
            raise ValueError(
                f"curriculum.lower_below={self.lower_below}: must be below "
                f"curriculum.raise_above={self.raise_above}."
            )


class ReasoningGym(PromptSource):
    """Rows of reasoning-gym's tasks (`pip install 'prl-lightning[gym]'`).

    A row depends on the seed, the position and the level of its task. Its columns: ``task``,
    ``question``, ``answer``, and for `ReasoningGymReward` ``entry`` and ``config``.

    Args:
        tasks: by reasoning-gym's names.
        size: number of rows. They are made on demand, so a training source can be large.
        seed: of the rows.
        instruction: put after every question, in a paragraph of its own.
        curriculum: moves the tasks that have a level; in training only.

    Raises:
        ValueError: a value is out of range.
    """

    def __init__(
        self,
        tasks: Mapping[str, GymTask],
        size: int,
        seed: int = 0,
        instruction: str | None = "Give the final answer between <answer> and </answer>.",
        curriculum: Curriculum | None = None,
    ) -> None:
        for name, fits, wanted in (
            ("tasks", tasks, "name at least one"),
            ("size", 1 <= size <= LARGEST, f"must be between 1 and {LARGEST}"),
            ("seed", seed >= 0, "must be at least 0"),
        ):
            if not fits:
                raise ValueError(f"ReasoningGym: {name}={locals()[name]}: {wanted}.")
        self.tasks = tasks
        self.size = size
        self.seed = seed
        self.instruction = instruction
        self.curriculum = curriculum
        self.levels = {name: task.level for name, task in tasks.items() if task.level is not None}
        self._means: dict[str, list[float]] = {name: [] for name in self.levels}  # at this level
        self._datasets: dict[tuple[str, int | None], Any] = {}

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.size

    def check(self) -> None:
        """Check tasks, parameters and levels.

        Raises:
            DataError: reasoning-gym is missing, or does not have them.
        """
        if importlib.util.find_spec("reasoning_gym") is None:
            raise DataError(
                "ReasoningGym needs reasoning-gym: run `pip install 'prl-lightning[gym]'`."
            )
        for name, task in self.tasks.items():
            check_task(name, task, moves=self.curriculum is not None)
        if self.curriculum is not None and not self.levels:
            raise DataError(
                f"ReasoningGym: curriculum is set, but none of the tasks {sorted(self.tasks)} has "
                "a level. Give those that it should move `level: 0`."
            )

    def row(self, position: int, attempt: int) -> dict[str, Any]:
        """Return the row of a position."""
        draw = random.Random(f"{self.seed} {position}")
        weights = [task.weight for task in self.tasks.values()]
        [name] = draw.choices(list(self.tasks), weights)
        chunk, place = divmod(position + attempt * self.size, CHUNK)
        # Row i of reasoning-gym's dataset with seed s is a function of s + i.
        seed = random.Random(f"{self.seed} {name}").getrandbits(31) + chunk * CHUNK
        # Some tasks use the global generators, and some print.
        with isolate_rng(include_cuda=False), redirect_stdout(StringIO()):
            dataset = self._dataset(name)
            dataset.seed = dataset.config.seed = seed
            dataset.size = CHUNK  # word_ladder lowers it
            random.seed(seed + place)
            np.random.seed(seed + place)
            entry = dataset[place]
        parts = [entry["question"], self.instruction]
        return {
            "prompt": "\n\n".join(part for part in parts if part),
            "task": name,
            "question": entry["question"],
            "answer": entry["answer"],
            "entry": entry,
            "config": parameters(dataset.config),
        }

    def observe(self, rollouts: Sequence[Rollout]) -> dict[str, float]:
        """Log the mean reward and the level of each task, and move the levels; a collective."""
        names = list(self.tasks)
        own = torch.zeros(2, len(names), dtype=torch.float64)
        for rollout in rollouts:
            name = rollout.prompt.columns.get("task", "")
            if name in self.tasks:
                own[:, names.index(name)] += torch.tensor([rollout.reward, 1.0])
        sums, counts = sum_over_ranks(own)
        means = dict(zip(names, (sums / counts).tolist(), strict=True))  # NaN without a rollout
        values = {f"task_reward/{name}": mean for name, mean in means.items()}
        if self.curriculum is not None:
            values |= {f"level/{name}": float(level) for name, level in self.levels.items()}
            for name in self.levels:
                if counts[names.index(name)]:
                    self._move(name, means[name], self.curriculum)
        return values

    def state_dict(self) -> dict[str, Any]:
        """Return the levels, and the mean rewards at each since it changed."""
        means = {name: list(values) for name, values in self._means.items()}
        return {"levels": dict(self.levels), "means": means}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the saved levels; tasks that are new begin at their own."""
        for name in self.levels.keys() & state["levels"].keys():
            self.levels[name] = state["levels"][name]
            self._means[name] = list(state["means"][name])

    def _move(self, name: str, mean: float, curriculum: Curriculum) -> None:
        """Add an iteration's mean reward, and change the level if there are enough."""
        means = self._means[name] = [*self._means[name], mean][-curriculum.iterations :]
        average = sum(means) / len(means)
        step = (average > curriculum.raise_above) - (average < curriculum.lower_below)
        level = min(max(self.levels[name] + step, 0), highest_level(name))
        if len(means) == curriculum.iterations and level != self.levels[name]:
            self.levels[name], self._means[name] = level, []

    def _dataset(self, name: str) -> Any:
        from reasoning_gym.factory import DATASETS

        level = self.levels.get(name)
        if (name, level) not in self._datasets:
            config = task_config(name, self.tasks[name], level)
            self._datasets[name, level] = DATASETS[name][0](config)
        return self._datasets[name, level]
