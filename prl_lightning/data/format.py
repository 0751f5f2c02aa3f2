"""PromptFormat: how a row of the data becomes what the model continues."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from prl_lightning.types import Message


@dataclass(frozen=True)
class PromptFormat:
    """How a row becomes the text that the model continues.

    Attributes:
        system_prompt: put before the problem: as the system message of a chat, or as a paragraph
            of its own where there is no chat template. A row's own system message goes before it.
        template: text around the problem, which replaces ``{prompt}`` in it.
        chat_template: apply the tokenizer's chat template. None: where the tokenizer has one.
        chat_template_args: what the chat template takes beside the messages, such as
            ``{enable_thinking: false}``.
        columns: this package's name of a column -> its name in the data, such as
            ``{prompt: problem, answer: solution}``; or several names, of which the first that a
            source has is taken, so that sources with different columns go together.
    """

    system_prompt: str | None = None
    template: str = "{prompt}"
    chat_template: bool | None = None
    columns: Mapping[str, str | list[str]] = field(default_factory=dict)
    chat_template_args: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse a template that would drop the problem."""
        if "{prompt}" not in self.template:
            raise ValueError(
                f"data.format.template={self.template!r} lacks '{{prompt}}', the place of the "
                "problem."
            )

    def rename(self, rows: Dataset, where: str) -> Dataset:
        """Give the columns this package's names.

        Raises:
            ValueError: a column is missing, or is named twice.
        """
        names = {}
        for ours, theirs in {"prompt": "prompt", **self.columns}.items():
            options = [theirs] if isinstance(theirs, str) else theirs
            present = [name for name in options if name in rows.column_names]
            if not present:
                raise ValueError(
                    f"{where} has no column {' or '.join(map(repr, options))}; it has "
                    f"{sorted(rows.column_names)}. Say which one it is in data.format.columns, for "
                    f"example {{{ours}: {rows.column_names[0]}}}."
                )
            names[ours] = present[0]
        used = set(names.values())
        if len(used) < len(names):
            raise ValueError(f"data.format.columns={names} names a column of {where} twice.")
        replaced = [ours for ours in names if ours in rows.column_names and ours not in used]
        # All at once, so that two columns can change places.
        return rows.remove_columns(replaced).rename_columns(
            {theirs: ours for ours, theirs in names.items() if ours != theirs}
        )

    def render(self, source: str | list[Message], tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Token ids of a prompt (text or chat messages).

        Raises:
            ValueError: chat messages, but the tokenizer has no chat template; or neither.
        """
        if not source or not isinstance(source, str | list):
            raise ValueError(
                f"data: a row's prompt is neither text nor chat messages: {source!r}. Remove the "
                "row, or say in data.format.columns which column has the prompt."
            )
        is_chat = not isinstance(source, str)
        chat = is_chat or self.chat_template
        if self.chat_template is None:
            chat = is_chat or tokenizer.chat_template is not None
        if chat and tokenizer.chat_template is None:
            raise ValueError(
                "data: the prompts are chat messages (or data.format.chat_template is true), but "
                "the tokenizer has no chat template. Use text prompts, or a tokenizer with one."
            )
        messages: list[Message] = (
            [dict(message) for message in source]
            if not isinstance(source, str)
            else [{"role": "user", "content": source}]
        )
        messages[-1]["content"] = self.template.replace("{prompt}", messages[-1]["content"])
        if chat:
            if self.system_prompt is not None and messages[0]["role"] != "system":
                messages.insert(0, {"role": "system", "content": self.system_prompt})
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **self.chat_template_args
            )
            return list(tokenizer(text, add_special_tokens=False)["input_ids"])
        head = "" if self.system_prompt is None else f"{self.system_prompt}\n\n"
        return list(tokenizer(head + messages[0]["content"])["input_ids"])
