"""Read the prompts of rows: texts, or chat messages in the forms that datasets have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prl_lightning.types import Message


def read_prompt(source: Any) -> str | list[Message]:
    """Return a prompt in one form.

    In chat messages, keys whose value is None are left out, because tables add them where rows
    differ. Contents that consist of text parts are joined.

    Args:
        source: the value in the data.

    Raises:
        ValueError: it is neither text nor chat messages, or a message has no text.
    """
    if isinstance(source, str) and source:
        return source
    if isinstance(source, list) and source:
        return [_read_message(index, message) for index, message in enumerate(source)]
    raise ValueError(
        f"the prompt is {source!r:.300}, neither text nor chat messages. Remove the row, or name "
        "the column of the prompts in data.format.columns."
    )


def appended(source: str | list[Message], text: str) -> str | list[Message]:
    """Return a prompt with a text at the end: of a chat, at the end of the user's last message.

    Args:
        source: text or chat messages; a chat without a user gets a message of one.
        text: to append.
    """
    if isinstance(source, str):
        return source + text
    asked = [place for place, message in enumerate(source) if message["role"] == "user"]
    if not asked:
        return [*source, {"role": "user", "content": text}]
    last = source[asked[-1]]
    changed = last | {"content": last["content"] + text}
    return [*source[: asked[-1]], changed, *source[asked[-1] + 1 :]]


def _read_message(index: int, value: Any) -> Message:
    message = _without_none(value)
    role = message.get("role") if isinstance(message, Mapping) else None
    if not isinstance(role, str):
        raise ValueError(f"message {index} of the prompt is {value!r:.300}, without a text 'role'.")
    if not message.get("tool_calls"):
        message.pop("tool_calls", None)
    elif role == "assistant" and "content" not in message:
        return message
    content = message.get("content")
    if isinstance(content, list) and all(map(_is_text_part, content)):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise ValueError(
            f"message {index} of the prompt, of role {role!r}, has the content {content!r:.300}. "
            "It must be a text, or a list of {type: text, text: ...}."
        )
    return message | {"content": content}


def _is_text_part(part: Any) -> bool:
    is_text = isinstance(part, Mapping) and part.get("type") == "text"
    return is_text and isinstance(part.get("text"), str)


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value
