"""EnvironmentHost: environments and tools as they run in the sandbox's processes."""

from __future__ import annotations

import base64
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import cloudpickle

from prl_lightning.rewards.protocol import accepted, awaited

RESERVED = ("reset", "get_reward")  # of the protocol: never called by the model

# Name of the tool, arguments by name or in order, and why the text is no call.
Call = tuple[str, "dict[str, Any] | list[str]", str]


def tools_of(environment: Any) -> dict[str, Callable[..., Any]]:
    """Return the public methods of an environment, which a model may call, by name."""
    if environment is None:
        return {}
    methods = inspect.getmembers(environment, inspect.ismethod)
    return {
        name: method
        for name, method in methods
        if not name.startswith("_") and name not in RESERVED
    }


class EnvironmentHost:
    """Create environments, call their tools, ask for their rewards.

    Between two calls an environment is a pickle, which only the sandbox's processes read. So any of
    them can make the next call, and a call that is killed costs neither the environment nor another
    one.

    Args:
        factories: create environments, by name.
        tools: functions that every model may call besides the methods of its environment.
        characters: limit of a result; the rest is cut off.
    """

    def __init__(
        self,
        factories: Mapping[str, Callable[[], Any]],
        tools: Sequence[Callable[..., Any]],
        characters: int,
    ) -> None:
        self.factories = factories
        self.tools = {tool.__name__: tool for tool in tools}
        self.characters = characters

    def open(self, name: str, row: dict[str, Any]) -> dict[str, str]:
        """Create an environment and reset it.

        Args:
            name: of its factory.
            row: of the data; ``reset`` gets the columns that it accepts.

        Returns:
            Its state, and the text that it adds to the prompt.
        """
        environment = self.factories[name]()
        added = awaited(environment.reset(**accepted(environment.reset, row)))
        text = "" if added is None else str(added)[: self.characters]
        return {"state": _freeze(environment), "text": text}

    def call(self, state: str, calls: Sequence[Call]) -> dict[str, Any]:
        """Make the calls of a turn, one after the other.

        Args:
            state: of the environment; empty if there is none.
            calls: of the turn.

        Returns:
            The new state, a result and whether it is an error for each call, and whether the
            environment says that the episode is over.
        """
        environment = _thaw(state)
        tools = self.tools | tools_of(environment)
        results = [self._result(tools, *call) for call in calls]
        return {
            "state": state and _freeze(environment),
            "results": results,
            "done": bool(getattr(environment, "done", False)),
        }

    def reward(self, state: str) -> float | None:
        """Return what the environment's ``get_reward`` returns; None if it has none."""
        environment = _thaw(state)
        if not hasattr(environment, "get_reward"):
            return None
        reward = awaited(environment.get_reward())
        return None if reward is None else float(reward)

    def _result(
        self,
        tools: Mapping[str, Callable[..., Any]],
        name: str,
        arguments: dict[str, Any] | list[str],
        error: str,
    ) -> tuple[str, bool]:
        """Return a result, and whether it is an error that the model has made or met."""
        if not error and name not in tools:
            error = f"there is no tool {name!r}, only {', '.join(tools)}"
        if error:
            return f"error: {error}"[: self.characters], True
        try:
            by_name = _named(tools[name], arguments) if isinstance(arguments, list) else arguments
            return _text(awaited(tools[name](**by_name)))[: self.characters], False
        except MemoryError:
            raise  # a limit of the sandbox, which counts
        except Exception as exception:
            what = str(exception) or type(exception).__name__
            return f"error: {what}"[: self.characters], True


def _named(tool: Callable[..., Any], words: Sequence[str]) -> dict[str, Any]:
    """Bind words to a tool's arguments, as numbers where its type hints say so."""
    signature = inspect.signature(tool, eval_str=True)
    bound = signature.bind(*words).arguments
    kinds = {name: signature.parameters[name].annotation for name in bound}
    return {
        name: kinds[name](word) if kinds[name] in (int, float) else word
        for name, word in bound.items()
    }


def _text(result: Any) -> str:
    return result if isinstance(result, str) else json.dumps(result, default=str)


def _freeze(environment: Any) -> str:
    try:
        return base64.b64encode(cloudpickle.dumps(environment)).decode()
    except Exception as error:
        raise TypeError(
            f"{type(environment).__name__} cannot be pickled, but is kept between turns as a "
            f"pickle ({error}). Leave connections and open files out in __getstate__."
        ) from error


def _thaw(state: str) -> Any:
    return cloudpickle.loads(base64.b64decode(state)) if state else None
