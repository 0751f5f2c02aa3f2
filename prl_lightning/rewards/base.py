"""The reward protocol, and running reward functions so that a mistake in one cannot pass unseen.

A reward function has TRL's signature (https://huggingface.co/docs/trl, "Using a custom reward
function"): it is called with keywords only,

    f(prompts=..., completions=..., **columns) -> list[float | None]

where `columns` are the dataset's other columns, one value per completion. A function without
`**kwargs` gets the names it accepts and no others. `None` says "not applicable to this completion".
A prompt is a text or a list of chat messages; a completion has its prompt's form.
"""

import inspect
import math
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypeAlias

import torch
from torch import Tensor

RewardFunction: TypeAlias = Callable[..., Sequence[float | None]]

NO_ANSWER = -1  # the number of a completion without an answer, among those of `answers`

# What every reward function can ask for without the dataset having a column of that name.
PROVIDED = frozenset({"prompts", "completions", "completion_ids"})


def completion_text(completion: Any) -> str:
    """Read a completion's text, whichever of TRL's two forms it has.

    Args:
        completion: A text, or chat messages, of which the last one's content is read.

    Returns:
        The text; of content in typed parts, the text parts joined.

    Raises:
        TypeError: If it is neither.

    Example:
        >>> completion_text("4"), completion_text([{"role": "assistant", "content": "4"}])
        ('4', '4')
    """
    if isinstance(completion, str):
        return completion
    try:
        content = completion[-1]["content"]
        if isinstance(content, str):
            return content
        return "".join(part["text"] for part in content if part["type"] == "text")
    except (TypeError, KeyError, IndexError) as error:
        raise TypeError(
            "a completion is a text or a non-empty list of messages with 'role' and 'content', "
            f"got {completion!r}"
        ) from error


@dataclass(frozen=True)
class RewardScores:
    """What the reward functions gave B completions.

    Attributes:
        total: Weighted sum of the parts that apply, (B,) float32.
        parts: Each function's unweighted rewards by name, (B,) float32, NaN where not applicable.
        failures: Per function, how many completions it could not judge (its own `failures`
            attribute after the call; 0 for a function that has none).
        unrewarded: Completions to which no function applied; their total is 0.
    """

    total: Tensor
    parts: dict[str, Tensor]
    failures: dict[str, int]
    unrewarded: int


class RewardSum:
    """A weighted sum of reward functions.

    Args:
        functions: Reward functions: functions, or objects that can be called as one. Such an object
            may have an attribute `columns`, the columns it needs beyond those in its signature (a
            tuple of names; an entry that is itself a tuple means "one of these"), an attribute
            `failures`, the number of completions that its last call could not judge, and a method
            `answers`, see `RewardSum.answers`.
        weights: One weight per function; `None` weighs each by 1.

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
        self, functions: Sequence[RewardFunction], weights: Sequence[float] | None = None
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
        self.names = _distinct_names(self.functions)

    def check_columns(self, column_names: Collection[str]) -> None:
        """Check, before anything is sampled, that every function finds the columns it needs.

        Args:
            column_names: Names of the dataset's columns.

        Raises:
            ValueError: If a function needs one that is not there; names both and the mend.
        """
        available = PROVIDED | set(column_names)
        for name, function in zip(self.names, self.functions, strict=True):
            for alternatives in _required_columns(function):
                if available.isdisjoint(alternatives):
                    wanted = " or ".join(f"'{column}'" for column in alternatives)
                    raise ValueError(
                        f"reward function '{name}' needs the column {wanted}, but the data has "
                        f"{sorted(column_names)}: rename the column with data.format.columns, "
                        "or give the function's parameter a default"
                    )

    def answers(self, completions: Sequence[str]) -> list[int] | None:
        """Say which completions of one prompt have the same answer, for a majority vote.

        Args:
            completions: n texts.

        Returns:
            n numbers, the same for the same answer and `NO_ANSWER` where there is none, by the
            first function that has a method `answers(texts)`; `None` if no function has one.
        """
        for function in self.functions:
            if hasattr(function, "answers"):
                found: list[int] = function.answers(completions)
                return found
        return None

    def score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        columns: Mapping[str, Sequence[Any]],
    ) -> RewardScores:
        """Reward B completions.

        Args:
            prompts: B prompts, each a text or chat messages.
            completions: B texts. One whose prompt is a chat is handed to the functions as an
                assistant message, `[{"role": "assistant", "content": text}]`, as TRL does.
            columns: Dataset columns, B values each, in the completions' order.

        Returns:
            The sum, its parts and the failures.

        Raises:
            ValueError: If the lengths do not agree, a column is missing, or a function returns
                something that is not B finite numbers (or `None`).
            RuntimeError: If a function raises; its error is the cause.
        """
        self.check_columns(columns)
        _check_lengths(len(completions), {"prompts": prompts, **columns})
        messages = [
            _in_form_of(prompt, completion)
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        arguments = {**columns, "prompts": list(prompts), "completions": messages}
        parts, failures = {}, {}
        for name, function in zip(self.names, self.functions, strict=True):
            values = _numbers(name, _call(name, function, arguments), len(messages))
            parts[name] = torch.tensor(values, dtype=torch.float32)
            failures[name] = int(getattr(function, "failures", 0))
        stacked = torch.stack(list(parts.values()))  # (functions, B)
        total = stacked.nan_to_num(nan=0.0).mul(torch.tensor(self.weights)[:, None]).sum(dim=0)
        unrewarded = int(stacked.isnan().all(dim=0).sum())
        if unrewarded:
            warnings.warn(
                f"{unrewarded} of {len(messages)} completions got no reward from any of "
                f"{self.names} (each returned None); they count as 0",
                stacklevel=2,
            )
        return RewardScores(total, parts, failures, unrewarded)


def _distinct_names(functions: Sequence[RewardFunction]) -> list[str]:
    names: list[str] = []
    for function in functions:
        function = getattr(function, "func", function)  # functools.partial
        base = getattr(function, "__name__", type(function).__name__)
        name, count = base, 1
        while name in names:
            count += 1
            name = f"{base}#{count}"
        names.append(name)
    return names


def _parameters(function: RewardFunction) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except ValueError:  # some callables written in C do not say; let them have everything
        return [inspect.Parameter("columns", inspect.Parameter.VAR_KEYWORD)]


def _required_columns(function: RewardFunction) -> list[tuple[str, ...]]:
    """Columns without which `function` cannot be called; each entry is a choice of names."""
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    required = [
        (parameter.name,)
        for parameter in _parameters(function)
        if parameter.default is parameter.empty and parameter.kind not in variadic
    ]
    declared = getattr(function, "columns", ())
    return required + [(entry,) if isinstance(entry, str) else tuple(entry) for entry in declared]


def _check_lengths(size: int, columns: Mapping[str, Sequence[Any]]) -> None:
    for name, values in columns.items():
        if len(values) != size:
            raise ValueError(
                f"column '{name}' has {len(values)} values for {size} completions: "
                "every column holds one value per completion"
            )


def _in_form_of(prompt: Any, completion: Any) -> Any:
    if isinstance(prompt, str) or not isinstance(completion, str):
        return completion
    return [{"role": "assistant", "content": completion}]


def _call(name: str, function: RewardFunction, arguments: Mapping[str, Any]) -> Any:
    """Call `function` with those of `arguments` that it accepts."""
    count, parameters = len(arguments["completions"]), _parameters(function)
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        accepted = {parameter.name for parameter in parameters}
        arguments = {key: value for key, value in arguments.items() if key in accepted}
    try:
        return function(**arguments)
    except Exception as error:
        raise RuntimeError(
            f"reward function '{name}' raised {type(error).__name__}: {error}. It was called with "
            f"{count} completions and {sorted(arguments)}; mend it so that it returns a "
            "number, or None where it does not apply, for every completion"
        ) from error


def _numbers(name: str, returned: Any, size: int) -> list[float]:
    """The `size` rewards that `returned` holds, NaN for None; a ValueError if it does not."""
    values = returned.tolist() if hasattr(returned, "tolist") else returned  # arrays and tensors
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise ValueError(
            f"reward function '{name}' returned {type(returned).__name__}: "
            "return a list of numbers, one for each completion"
        )
    if len(values) != size:
        raise ValueError(
            f"reward function '{name}' returned {len(values)} rewards for {size} completions: "
            "return one for each, in their order (None where it does not apply)"
        )
    return [_number(name, index, value) for index, value in enumerate(values)]


def _number(name: str, index: int, value: Any) -> float:
    if value is None:
        return math.nan
    number = value.item() if hasattr(value, "item") else value  # numpy and torch scalars
    if isinstance(number, Real) and math.isfinite(number):
        return float(number)
    raise ValueError(
        f"reward function '{name}' returned {value!r} for completion {index}: "
        "return a finite number, or None where it does not apply"
    )
