"""The arguments of reward functions, and the values that they may return.

A reward function has TRL's signature (https://huggingface.co/docs/trl, "Using a custom reward
function"): it is called with keywords only,

    f(prompts=..., completions=..., **columns) -> list[float | None]

where `columns` are the dataset's other columns, one value per completion. A function without
`**kwargs` gets only the arguments that it names. It may be an async function. `None` means "not
applicable to this completion". A prompt is a text or a list of chat messages. A completion has the
same form as its prompt.
"""

import asyncio
import inspect
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from functools import cache
from numbers import Real
from typing import Any, TypeAlias

RewardFunction: TypeAlias = Callable[..., Sequence[float | None]]

NO_ANSWER = -1  # what `answers` returns for a completion without an answer

_LARGEST = 3.4028234663852886e38  # of float32, in which rewards are summed

# Arguments that need no column in the dataset.
PROVIDED = frozenset({"prompts", "completions", "completion_ids", "environment_reward"})


def completion_text(completion: Any) -> str:
    """Return a completion's text, for both of TRL's forms.

    Args:
        completion: A text, or chat messages. Of messages, the last one's content is read.

    Returns:
        The text. If the content consists of typed parts, the text parts are joined.

    Raises:
        TypeError: The completion is neither.

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


def in_form_of(prompt: Any, completion: Any) -> Any:
    """Wrap a text in an assistant's message if the prompt is a chat, as TRL does."""
    if isinstance(prompt, str) or not isinstance(completion, str):
        return completion
    return [{"role": "assistant", "content": completion}]


def distinct_names(functions: Sequence[RewardFunction]) -> list[str]:
    """Return the functions' names; repeated names become `name#2`, `name#3`."""
    names: list[str] = []
    for function in functions:
        function = getattr(function, "func", function)  # functools.partial
        base = getattr(function, "__name__", type(function).__name__)
        repeated = (f"{base}#{count}" for count in itertools.count(2))
        names.append(next(name for name in itertools.chain([base], repeated) if name not in names))
    return names


def required_columns(function: RewardFunction) -> list[tuple[str, ...]]:
    """List the columns that a function needs; each entry lists alternative names."""
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    required = [
        (parameter.name,)
        for parameter in _parameters(function)
        if parameter.default is parameter.empty and parameter.kind not in variadic
    ]
    declared = getattr(function, "columns", ())
    return required + [(entry,) if isinstance(entry, str) else tuple(entry) for entry in declared]


def accepted(function: RewardFunction, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Select the arguments that a function accepts."""
    parameters = _parameters(function)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return dict(arguments)
    names = {parameter.name for parameter in parameters}
    return {key: value for key, value in arguments.items() if key in names}


def awaited(returned: Any) -> Any:
    """Return what a function has returned; if it is an async function, wait for its result.

    All async functions of a process use one event loop, because clients keep connections in it.
    """
    if not inspect.isawaitable(returned):
        return returned

    async def result() -> Any:
        return await returned

    thread, runner = _event_loop()
    return thread.submit(runner.run, result()).result()


@cache
def _event_loop() -> tuple[ThreadPoolExecutor, asyncio.Runner]:
    """In a thread, since the caller's may run an event loop already, as in a notebook."""
    return ThreadPoolExecutor(1, "prl-rewards"), asyncio.Runner()


def checked_rewards(name: str, returned: Any, size: int) -> list[float]:
    """Check a function's return value and convert it to floats.

    Args:
        name: Name of the function, for messages.
        returned: The return value: a list, an array or a tensor.
        size: Number of completions in the call.

    Returns:
        `size` rewards that are finite in float32, NaN for `None`.

    Raises:
        ValueError: The value does not consist of `size` finite numbers or `None`.
    """
    values = returned.tolist() if hasattr(returned, "tolist") else returned
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


def _parameters(function: RewardFunction) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except ValueError:  # some callables written in C have no signature: pass everything
        return [inspect.Parameter("columns", inspect.Parameter.VAR_KEYWORD)]


def _number(name: str, index: int, value: Any) -> float:
    if value is None:
        return math.nan
    number = value.item() if hasattr(value, "item") else value  # numpy and torch scalars
    if isinstance(number, Decimal):
        number = float(number)
    if isinstance(number, Real) and -_LARGEST <= number <= _LARGEST:  # type: ignore[operator]
        return float(number)
    raise ValueError(
        f"reward function '{name}' returned {value!r:.100} for completion {index}: "
        "return a finite number below 3.4e38, or None where it does not apply"
    )
