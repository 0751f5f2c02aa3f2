"""Prompts and tables as text for people."""

from __future__ import annotations

import json
from collections.abc import Sequence

from prl_lightning.types import Message


def prompt_text(source: str | list[Message]) -> str:
    """Turn a prompt into readable text: each chat message after its role.

    Args:
        source: see Prompt.

    Example:
        >>> prompt_text([{"role": "user", "content": "1 + 1?"}])
        'user: 1 + 1?'
    """
    if isinstance(source, str):
        return source
    # A message that only calls tools has no content.
    return "\n\n".join(f"{message['role']}: {message.get('content', '')}" for message in source)


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a table in Markdown.

    Args:
        columns: their names.
        rows: cells; text written by a model must go through ``code_span`` first.

    Example:
        >>> print(markdown_table(["set", "mean@8"], [["aime24", "0.25"]]))
        | set | mean@8 |
        | --- | --- |
        | aime24 | 0.25 |
    """
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def code_span(text: str) -> str:
    r"""Quote a model's text as one line of code, in which Markdown and HTML have no effect.

    Args:
        text: written by a model.

    Example:
        >>> code_span("a|b\n<c>")
        '`"a\\u007cb\\n<c>"`'
    """
    escaped = json.dumps(text, ensure_ascii=False)
    for mark in "|`":  # these would end the cell or the code
        escaped = escaped.replace(mark, f"\\u{ord(mark):04x}")
    return f"`{escaped}`"
