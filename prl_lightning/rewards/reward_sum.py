"""A weighted sum of reward functions, run so that a mistake in one cannot pass unseen."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from prl_lightning.rewards.calls import FailedCall, Judged, call_here, call_in_sandbox
from prl_lightning.rewards.protocol import (
    PROVIDED,
    RewardFunction,
    distinct_names,
    in_form_of,
    required_columns,
)
from prl_lightning.rewards.sandbox.client import Sandbox
from prl_lightning.rewards.sandbox.cores import usable_cores
from prl_lightning.rewards.sandbox.limits import Reply, RewardLimits, Task
from prl_lightning.rewards.votes import GroupAnswers, compare_here, compare_in_sandbox

if TYPE_CHECKING:  # loaded where sums are made: the processes of the functions do without it
    from torch import Tensor


@dataclass(frozen=True)
class RewardScores:
    """What the reward functions gave B completions.

    Attributes:
        total: Weighted sum of the parts that apply, (B,) float32.
        parts: Each function's unweighted rewards by name, (B,) float32, NaN where not applicable.
        failures: Per function, how many completions it could not judge: the calls that failed, and
            what its own attribute `failures` said after each call (0 for a function without).
        unrewarded: Completions to which no function applied; their total is 0.
        failed_calls: Those that raised, or were killed.
    """

    total: Tensor
    parts: dict[str, Tensor]
    failures: dict[str, int]
    unrewarded: int
    failed_calls: tuple[FailedCall, ...] = ()


class RewardSum:
    """A weighted sum of reward functions.

    Args:
        functions: Reward functions: functions, or objects that can be called as one. Such an object
            may have an attribute `columns`, the columns it needs beyond those in its signature (a
            tuple of names; an entry that is itself a tuple means "one of these"), an attribute
            `failures`, the number of completions that its last call could not judge, an attribute
            `errors`, the exceptions that its last call has caught (within limits, the first of them
            is the call's failure, as if it had not been caught), a method `answers`, see
            `RewardSum.answers`, and a method `warm_up`, see `RewardWorkers`. One with a true
            attribute `needs_batch` is called once with all completions; within limits, any other
            is called with one completion at a time.
        weights: One weight per function; `None` weighs each by 1.
        limits: Call the functions in processes of their own, within these limits; `None` calls
            them here, all completions at once, without any limit.

    Attributes:
        names: The functions' names, a repeated one made distinct as `name#2`.

    Raises:
        ValueError: If there is no function, or the weights are not one finite number for each.

    Example:
        >>> def length(completions, **columns):
        ...     return [float(len(text)) for text in completions]
        >>> scores = RewardSum([length], weights=[0.5]).score(["a?", "b?"], ["four", "xy"], {})
        >>> scores.total, scores.parts
        (tensor([2., 1.]), {'length': tensor([4., 2.])})
    """

    def __init__(
        self,
        functions: Sequence[RewardFunction],
        weights: Sequence[float] | None = None,
        limits: RewardLimits | None = None,
    ) -> None:
        if not functions:
            raise ValueError("no reward function was given: name at least one under rewards")
        weights = [1.0] * len(functions) if weights is None else list(weights)
        if len(weights) != len(functions):
            raise ValueError(
                f"{len(weights)} reward weights for {len(functions)} reward functions: "
                "give one weight for each, or none to weigh all by 1"
            )
        if not all(math.isfinite(weight) for weight in weights):
            raise ValueError(f"reward weights must be finite numbers, got {weights}")
        # TRL's users also pass the class itself; jsonargparse has made it an object already.
        self.functions = [f() if isinstance(f, type) else f for f in functions]
        self.weights = weights
        self.names = distinct_names(self.functions)
        self.limits = None if limits is None or limits.workers == 0 else limits
        self._sandbox: Sandbox | None = None

    def start(self, ranks: int = 1) -> None:
        """Begin to load the functions in their process; without it, the first call does.

        Without limits, their methods `warm_up` are called here.

        Args:
            ranks: Processes of this machine that have workers, and share its cores.

        Raises:
            TypeError: If a function cannot be sent to another process.
        """
        if self.limits is None:
            for function in self.functions:
                if hasattr(function, "warm_up"):
                    function.warm_up()
            return
        number = self.limits.workers or max(1, usable_cores() // ranks)
        self._sandbox = Sandbox(self.functions, self.limits.memory_mib, number)
        self._sandbox.start()

    def stop(self) -> None:
        """End the functions' processes."""
        if self._sandbox is not None:
            self._sandbox.stop()
            self._sandbox = None

    def check_columns(self, column_names: Collection[str], where: str = "the data") -> None:
        """Check, before anything is sampled, that every function finds the columns it needs.

        Args:
            column_names: Names of the dataset's columns.
            where: What has them, for the message.

        Raises:
            ValueError: If a function needs one that is not there; names both and the mend.
        """
        available = PROVIDED | set(column_names)
        for name, function in zip(self.names, self.functions, strict=True):
            for alternatives in required_columns(function):
                if available.isdisjoint(alternatives):
                    wanted = " or ".join(f"'{column}'" for column in alternatives)
                    raise ValueError(
                        f"reward function '{name}' needs the column {wanted}, but {where} has "
                        f"{sorted(column_names)}: rename the column with data.format.columns, "
                        "or give the function's parameter a default"
                    )

    @property
    def answering(self) -> str | None:
        """The name of the function that tells answers apart, if there is one."""
        pairs = zip(self.names, self.functions, strict=True)
        return next((name for name, function in pairs if hasattr(function, "answers")), None)

    def answers(
        self, groups: Sequence[Sequence[str]], left_out: Collection[tuple[int, int]] = ()
    ) -> GroupAnswers | None:
        """Say which completions of a prompt have the same answer, for a majority vote.

        Args:
            groups: The texts of each prompt.
            left_out: The group and the place in it of completions that are not compared, since
                that may take as long as judging them did. Each has an answer of its own.

        Returns:
            Numbers for each group, by the first function that has a method
            `answers(completions)`; `None` if no function has one.
        """
        if self.answering is None:
            return None
        index = self.names.index(self.answering)
        if self.limits is None:
            return compare_here(self.functions[index], groups)
        return compare_in_sandbox(index, groups, left_out, self.limits, self._run)

    def score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        columns: Mapping[str, Sequence[Any]],
        done: Callable[[], Any] = lambda: None,
    ) -> RewardScores:
        """Reward B completions.

        Args:
            prompts: B prompts, each a text or chat messages.
            completions: B texts. One whose prompt is a chat is handed to the functions as an
                assistant message, `[{"role": "assistant", "content": text}]`, as TRL does.
            columns: Dataset columns, B values each, in the completions' order.
            done: Called after every call of a function in its process.

        Returns:
            The sum, its parts and the failures.

        Raises:
            ValueError: If the lengths do not agree, a column is missing, or a function that is
                called here returns something that is not B finite numbers (or `None`).
            RuntimeError: If a function that is called here raises; its error is the cause.
        """
        self.check_columns(columns)
        _check_lengths(len(completions), {"prompts": prompts, **columns})
        messages = [
            in_form_of(prompt, completion)
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        arguments = {**columns, "prompts": list(prompts), "completions": messages}
        functions = dict(zip(self.names, self.functions, strict=True))
        if self.limits is None:
            return self._sum(call_here(functions, arguments, len(messages)))
        run = partial(self._run, done=done)
        return self._sum(call_in_sandbox(functions, arguments, len(messages), self.limits, run))

    def _run(self, tasks: Sequence[Task], done: Callable[[], Any] = lambda: None) -> list[Reply]:
        if self._sandbox is None:
            self.start()
        assert self._sandbox is not None
        return self._sandbox.run(tasks, done)

    def _sum(self, judged: Judged) -> RewardScores:
        import torch

        tensors = {name: torch.tensor(part).float() for name, part in judged.parts.items()}
        stacked = torch.stack(list(tensors.values()))  # (functions, B)
        total = stacked.nan_to_num(nan=0.0).mul(torch.tensor(self.weights)[:, None]).sum(dim=0)
        unrewarded = int(stacked.isnan().all(dim=0).sum())
        if unrewarded:
            warnings.warn(
                f"{unrewarded} of {len(total)} completions got no reward from any of "
                f"{self.names} (each returned None); they count as 0",
                stacklevel=3,
            )
        return RewardScores(total, tensors, judged.failures, unrewarded, tuple(judged.failed_calls))


def _check_lengths(size: int, columns: Mapping[str, Sequence[Any]]) -> None:
    for name, values in columns.items():
        if len(values) != size:
            raise ValueError(
                f"column '{name}' has {len(values)} values for {size} completions: "
                "every column holds one value per completion"
            )
