"""Environments: the section ``data.environments`` of a configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from prl_lightning.environments.formats import ChatTools, ToolFormat
from prl_lightning.rewards.sandbox.environment import EnvironmentHost, tools_of

ONLY = ""  # name of a single factory
COLUMN = "environment"

Factory = type[Any] | Callable[..., Any]


class Environments:
    """Let the model act in several turns: call tools, read their results, and go on.

    The protocol is TRL's (1.16, ``environment_factory`` and ``tools``). An environment has a method
    ``reset(**row) -> str | None``, called with the columns of the data; its text is appended to the
    prompt. Its other public methods are tools. With ``get_reward() -> float`` it can be rewarded
    by ``prl_lightning.rewards.EnvironmentReward``. Beyond TRL's: an attribute ``done`` that is
    true after a call ends the episode.

    An episode is one completion: sampled turns, and between them what the environment wrote, which
    is not trained on. It ends with a turn without a call, or is cut at a limit:
    ``rollout.max_new_tokens`` is the limit of the whole episode. Environments run in subprocesses
    under ``rollout.limits``, and are pickled between turns.

    Args:
        environments: a class, or a function without arguments that creates one; or several of them
            by name, of which the column ``environment`` of the data names one.
        tools: functions that may be called in every episode.
        format: how calls are written; by default as the model's chat template does.
        max_turns: sampled turns of an episode.
        turn_tokens: sampled tokens of a turn; by default ``max_new_tokens / max_turns``.
        result_tokens: of what an environment says at a time; the rest is cut off.

    Raises:
        ValueError: a value out of range, or neither an environment nor a tool.
    """

    def __init__(
        self,
        environments: Factory | dict[str, Factory] | None = None,
        tools: list[Callable[..., Any]] | None = None,
        format: ToolFormat | None = None,
        max_turns: int = 8,
        turn_tokens: int | None = None,
        result_tokens: int = 256,
    ) -> None:
        self.factories: dict[str, Factory] = {}
        if isinstance(environments, Mapping):
            self.factories |= environments
        elif environments is not None:
            self.factories[ONLY] = environments
        self.tools = tools or []
        self.format = ChatTools() if format is None else format
        self.max_turns = max_turns
        self.turn_tokens = turn_tokens
        self.result_tokens = result_tokens
        if not self.factories and not self.tools:
            raise ValueError("data.environments has neither environments nor tools: name one.")
        for name, value in (
            ("max_turns", max_turns),
            ("turn_tokens", turn_tokens or 1),
            ("result_tokens", result_tokens),
        ):
            if value < 1:
                raise ValueError(f"data.environments.{name}={value}: must be at least 1.")

    def check(self, tokenizer: PreTrainedTokenizerBase, template_args: Mapping[str, Any]) -> None:
        """Create each environment once, and describe its tools; nothing is reset.

        Args:
            tokenizer: the policy's.
            template_args: of the chat template.

        Raises:
            ValueError: the model cannot call tools, an environment lacks ``reset``, or a tool
                cannot be described.
        """
        self.format.check(tokenizer, template_args)
        self._schemas: dict[str, list[dict[str, Any]] | None] = {}
        for name, factory in self.factories.items() or [(ONLY, None)]:
            environment = None if factory is None else factory()
            if environment is not None and not callable(getattr(environment, "reset", None)):
                raise ValueError(
                    f"data.environments: {type(environment).__name__} has no method reset(**row)."
                )
            tools = [*self.tools, *tools_of(environment).values()]
            self._schemas[name] = self.format.schemas(tools)

    def name_of(self, columns: Mapping[str, Any]) -> str:
        """Return the name of a row's environment.

        Args:
            columns: of the row.

        Raises:
            ValueError: it names none of several.
        """
        if self.factories.keys() <= {ONLY}:
            return ONLY
        name = columns.get(COLUMN)
        if name not in self.factories:
            raise ValueError(
                f"the column '{COLUMN}' is {name!r}, but data.environments.environments has "
                f"{', '.join(self.factories)}"
            )
        return str(name)

    def schemas(self, columns: Mapping[str, Any]) -> list[dict[str, Any]] | None:
        """Return what the chat template is told of a row's tools; None if nothing.

        Args:
            columns: of the row.
        """
        return self._schemas[self.name_of(columns)]

    def tokens_of_turn(self, max_new_tokens: int) -> int:
        """Return the limit of a turn, in tokens.

        Args:
            max_new_tokens: limit of an episode.
        """
        return self.turn_tokens or max(1, max_new_tokens // self.max_turns)

    def host(self) -> EnvironmentHost:
        """Return what runs in the sandbox."""
        # A token has seldom more characters than this, and the tokens are counted again.
        return EnvironmentHost(self.factories, self.tools, 8 * self.result_tokens)

    def identity(self) -> str:
        """Return what completions depend on, for the cache of an evaluation."""
        named: Sequence[Any] = [*self.factories.items(), *self.tools]
        limits = (self.max_turns, self.turn_tokens, self.result_tokens)
        return f"{named} {type(self.format).__name__} {vars(self.format)} {limits}"
