"""ToolFormat: how a model writes the calls of its tools, and how it is told their results."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils import get_json_schema

from prl_lightning.sampling.stops import turn_end
from prl_lightning.types import Message

_TAGGED = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|$)", re.DOTALL)
_MARK = "last-argument"  # found again in what the chat template makes of a call


@dataclass(frozen=True)
class ToolCall:
    """A call that a model has written.

    Attributes:
        name: of the tool.
        arguments: by their names, or in their order as texts.
        error: why the text cannot be read as a call; the model is told so.
    """

    name: str
    arguments: dict[str, Any] | list[str] = field(default_factory=dict)
    error: str = ""


class ToolFormat(ABC):
    """How calls and results are written; named in a configuration by its ``class_path``.

    Attributes:
        stop_texts: texts that end a turn besides the stop tokens.
    """

    stop_texts: tuple[str, ...] = ()

    def check(  # noqa: B027  (optional)
        self, tokenizer: PreTrainedTokenizerBase, template_args: Mapping[str, Any]
    ) -> None:
        """Raise a ValueError if a model with this tokenizer cannot use the format.

        Args:
            tokenizer: the policy's.
            template_args: ``data.format.chat_template_args``.
        """

    def schemas(self, tools: Sequence[Callable[..., Any]]) -> list[dict[str, Any]] | None:
        """Return the descriptions of tools for the chat template; None if it gets none."""
        return None

    @abstractmethod
    def parse(self, turn: str, tokenizer: PreTrainedTokenizerBase) -> list[ToolCall]:
        """Return the calls of a turn, in order; none ends the episode.

        Args:
            turn: text of the sampled tokens with special tokens, without the stop token.
            tokenizer: the policy's.
        """

    @abstractmethod
    def reply(
        self,
        calls: Sequence[ToolCall],
        results: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        template_args: Mapping[str, Any],
    ) -> str:
        """Return the text between the end of the turn with the calls and the next turn.

        Args:
            calls: of the turn, at least one.
            results: one per call.
            tokenizer: the policy's.
            template_args: ``data.format.chat_template_args``.
        """


class ChatTools(ToolFormat):
    """Calls and results as the model's chat template writes them.

    The template describes the tools in the prompt, by their type hints and docstrings. Calls are
    read by the tokenizer's ``response_template`` or, without one, as JSON between ``<tool_call>``
    and ``</tool_call>``.
    """

    def check(self, tokenizer: PreTrainedTokenizerBase, template_args: Mapping[str, Any]) -> None:
        """See ``ToolFormat.check``."""
        calls = [ToolCall("multiply", {"x": _MARK})]
        try:
            text = _render(tokenizer, template_args, calls, ["result-of-it"])
        except Exception as error:  # a template is a program
            text = f"(the template raised {type(error).__name__}: {error})"
        if tokenizer.chat_template is None or _MARK not in text or "result-of-it" not in text:
            raise ValueError(
                "data.environments: the chat template of this model has no calls of tools. Use a "
                "model that was trained with tools, or set data.environments.format to "
                "prl_lightning.environments.TextTools."
            )
        if self.parse(text, tokenizer) != calls or turn_end(tokenizer, template_args) is None:
            raise ValueError(
                "data.environments: the chat template of this model writes calls of tools in a "
                f"form that cannot be read back: {text!r}. Set the tokenizer's response_template, "
                "or data.environments.format to a ToolFormat of your own."
            )

    def schemas(self, tools: Sequence[Callable[..., Any]]) -> list[dict[str, Any]]:
        """See ``ToolFormat.schemas``.

        Raises:
            ValueError: a tool has no docstring, or an argument without type or description.
        """
        found = []
        for tool in tools:
            try:
                found.append(get_json_schema(tool))
            except Exception as error:
                raise ValueError(
                    f"data.environments: the tool {tool.__name__!r} cannot be described to the "
                    f"model: {error}. Give it a docstring with Args, and type hints."
                ) from error
        return found

    def parse(self, turn: str, tokenizer: PreTrainedTokenizerBase) -> list[ToolCall]:
        """See ``ToolFormat.parse``."""
        if getattr(tokenizer, "response_template", None) is None:
            return [_read_json(text) for text in _TAGGED.findall(turn)]
        try:
            message = tokenizer.parse_response(turn)
        except Exception as error:  # of a text that is not a message
            return [ToolCall("", error=f"the message cannot be read: {error}")]
        return [_read(call.get("function", call)) for call in message.get("tool_calls") or []]

    def reply(
        self,
        calls: Sequence[ToolCall],
        results: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        template_args: Mapping[str, Any],
    ) -> str:
        """See ``ToolFormat.reply``; special tokens in a result are left out."""
        special = re.compile("|".join(map(re.escape, tokenizer.all_special_tokens)))
        marked = [*calls[:-1], ToolCall(calls[-1].name, {"x": _MARK})]
        cleared = [special.sub("", result) for result in results]
        text = _render(tokenizer, template_args, marked, cleared)
        end, _ = turn_end(tokenizer, template_args) or ("", [])
        return text.partition(_MARK)[2].partition(end)[2]


class TextTools(ToolFormat):
    """Calls as texts such as ``<call>multiply 12 7</call>``, for models without a tool template.

    The first word is the tool, the others are its arguments. Nothing describes the tools to the
    model: say in the prompt how they are called, or train a model that knows.

    Args:
        opens: text before a call; empty for the start of the line.
        closes: text after a call; it ends the turn.
        result: what the model is told, around ``{result}``.
        tool: the tool of every call; then all words are arguments.

    Raises:
        ValueError: ``closes`` is empty, or ``result`` lacks its place.
    """

    def __init__(
        self,
        opens: str = "<call>",
        closes: str = "</call>",
        result: str = "{result}\n",
        tool: str | None = None,
    ) -> None:
        if not closes or "{result}" not in result:
            raise ValueError(
                f"TextTools: closes={closes!r}, result={result!r}: the first must not be empty, "
                "and the second must have '{result}'."
            )
        self.opens = opens
        self.result = result
        self.tool = tool
        self.stop_texts = (closes,)

    def parse(self, turn: str, tokenizer: PreTrainedTokenizerBase) -> list[ToolCall]:
        """See ``ToolFormat.parse``."""
        _, opens, after = turn.rpartition(self.opens or "\n")
        call, closes, _ = after.partition(self.stop_texts[0])
        if not closes:
            return []
        words = [*([self.tool] if self.tool else []), *call.split()]
        if not words or (self.opens and not opens):
            return [ToolCall("", error=f"write {self.opens}TOOL ARGUMENT{closes}")]
        return [ToolCall(words[0], words[1:])]

    def reply(
        self,
        calls: Sequence[ToolCall],
        results: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        template_args: Mapping[str, Any],
    ) -> str:
        """See ``ToolFormat.reply``."""
        return "".join(self.result.replace("{result}", result) for result in results)


def turn_message(text: str, calls: Sequence[ToolCall]) -> Message:
    """Return a turn as a chat message.

    Args:
        text: of the turn.
        calls: in it.
    """
    written = [
        {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in calls
    ]
    return {"role": "assistant", "content": text} | ({"tool_calls": written} if calls else {})


def told(calls: Sequence[ToolCall], results: Sequence[str]) -> list[Message]:
    """Return the results of calls as chat messages."""
    return [
        {"role": "tool", "name": call.name, "content": result}
        for call, result in zip(calls, results, strict=True)
    ]


def _render(
    tokenizer: PreTrainedTokenizerBase,
    template_args: Mapping[str, Any],
    calls: Sequence[ToolCall],
    results: Sequence[str],
) -> str:
    chat = [{"role": "user", "content": "?"}, turn_message("", calls), *told(calls, results)]
    text: str = tokenizer.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True, **template_args
    )
    return text


def _read_json(text: str) -> ToolCall:
    try:
        return _read(json.loads(text))
    except json.JSONDecodeError as error:
        return ToolCall("", error=f"the call is not JSON: {error}")


def _read(call: Any) -> ToolCall:
    name = call.get("name") if isinstance(call, Mapping) else None
    arguments = call.get("arguments", {}) if isinstance(call, Mapping) else None
    if not isinstance(name, str) or not isinstance(arguments, Mapping):
        return ToolCall("", error='a call has a "name" and "arguments" by their names')
    return ToolCall(name, dict(arguments))
