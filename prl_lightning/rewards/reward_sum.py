"""A weighted sum of reward functions, with checks of what goes in and out."""

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
from prl_lightning.rewards.sandbox.limits import Reply, RewardLimits, Task
from prl_lightning.rewards.votes import GroupAnswers, compare_here, compare_in_sandbox

if TYPE_CHECKING:  # imported when rewards are summed: the server does not need it
    from torch import Tensor


@dataclass(frozen=True)
class RewardScores:
    """The rewards of B completions.

    Attributes:
        total: Weighted sum of the parts that apply, (B,) float32.
        parts: Each function's unweighted rewards by name, (B,) float32, NaN where not applicable.
        failures: By name, how many completions the function could not judge. It adds up the calls
            that failed and the function's attribute `failures` after each call, if it has one.
        unrewarded: Number of completions to which no function applied; their total is 0.
        failed_calls: The calls that raised or were killed.
    """

    total: Tensor
    parts: dict[str, Tensor]
    failures: dict[str, int]
    unrewarded: int
    failed_calls: tuple[FailedCall, ...] = ()


class RewardSum:
    """A weighted sum of reward functions.

    Args:
        functions: Functions, or callable objects. An object may have these attributes:
            `columns`: a tuple of the columns that it needs in addition to its parameters. An entry
            that is itself a tuple lists alternatives.
            `failures`: the number of completions that its last call could not judge.
            `errors`: the exceptions that its last call caught. Under limits, the call fails with
            the first one.
            `answers`: a method, see `RewardSum.answers`.
            `warm_up`: a method without arguments, called once before the first call, for slow
            imports and tables.
            `needs_batch`: if true, each call gets all completions. Otherwise each call under limits
            gets one.
        weights: One weight per function; `None` means 1 for each.
        limits: Call the functions in other processes under these limits. `None` calls them in this
            process, with all completions at once and without limits.

    Attributes:
        names: The functions' names; repeated names become `name#2`, `name#3`.

    Raises:
        ValueError: There is no function, or there is not one finite weight for each.

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
            raise ValueError("rewards is empty: name at least one reward function")
        weights = [1.0] * len(functions) if weights is None else list(weights)
        if len(weights) != len(functions):
            raise ValueError(
                f"{len(weights)} reward weights for {len(functions)} reward functions: "
                "give one weight for each, or no weights"
            )
        if not all(math.isfinite(weight) for weight in weights):
            raise ValueError(f"reward weights must be finite numbers, got {weights}")
        # TRL accepts classes as well. From YAML, jsonargparse has already created the object.
        self.functions = [f() if isinstance(f, type) else f for f in functions]
        self.weights = weights
        self.names = distinct_names(self.functions)
        self.limits = None if limits is None or limits.workers == 0 else limits
        self._sandbox: Sandbox | None = None

    def start(self, ranks: int = 1) -> None:
        """Start loading the functions in their process; otherwise the first call starts it.

        Without limits, this calls their methods `warm_up` in this process.

        Args:
            ranks: Number of ranks on this machine, which share its cores.

        Raises:
            TypeError: A function cannot be pickled.
        """
        if self.limits is None:
            for function in self.functions:
                if hasattr(function, "warm_up"):
                    function.warm_up()
            return
        self._sandbox = Sandbox(self.functions, self.limits, self.limits.processes(ranks))
        self._sandbox.start()

    def stop(self) -> None:
        """Stop the functions' processes."""
        if self._sandbox is not None:
            self._sandbox.stop()
            self._sandbox = None

    def check_columns(self, column_names: Collection[str], where: str = "the data") -> None:
        """Check that the dataset has the columns that the functions need.

        Args:
            column_names: Names of the dataset's columns.
            where: Name of the dataset, for the message.

        Raises:
            ValueError: A function needs a column that is missing.
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
        """Name of the first function with a method `answers`, if there is one."""
        pairs = zip(self.names, self.functions, strict=True)
        return next((name for name, function in pairs if hasattr(function, "answers")), None)

    def answers(
        self, groups: Sequence[Sequence[str]], left_out: Collection[tuple[int, int]] = ()
    ) -> GroupAnswers | None:
        """Find out which completions of a prompt have equal answers, for a majority vote.

        It asks the first function with a method `answers(completions)`, which returns a number for
        each completion: equal numbers for equal answers, `NO_ANSWER` for none.

        Args:
            groups: The completions of each prompt.
            left_out: Completions that are not compared, as (index of the group, index in it).
                A completion on which the function failed would fail the comparison as well. Each
                counts as a distinct answer.

        Returns:
            The numbers, or `None` if no function has the method.
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
            completions: B texts. If the prompt is a chat, the functions get an assistant message,
                `[{"role": "assistant", "content": text}]`, as in TRL.
            columns: Dataset columns, B values each, in the order of the completions.
            done: Called after every call under limits.

        Returns:
            The sum, its parts and the failures.

        Raises:
            ValueError: The lengths differ, a column is missing, or a function that is called
                without limits returns something other than B finite numbers or `None`.
            RuntimeError: A function that is called without limits raises; its exception is the
                cause.
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
