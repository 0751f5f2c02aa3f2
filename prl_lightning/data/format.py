"""PromptFormat: how a row of the data becomes a prompt."""

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
        system_prompt: put before the problem, as the system message of a chat or, without a chat
            template, as a separate paragraph. A row's own system message replaces it.
        template: text around the problem; the problem replaces ``{prompt}``.
        chat_template: whether to apply the tokenizer's chat template. None applies it if there is
            one.
        chat_template_args: extra arguments of the chat template, such as
            ``{enable_thinking: false}``.
        columns: name of a column in this package -> its name in the data, such as
            ``{prompt: problem, answer: solution}``. With a list of names, each source uses the
            first one that it has, so that sources with different columns can be mixed.
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
                f"data.format.template={self.template!r} lacks '{{prompt}}', which the problem "
                "replaces."
            )

    def rename(self, rows: Dataset, where: str) -> Dataset:
        """Rename the columns to this package's names.

        Args:
            rows: as they are in the data.
            where: field and source of the rows, for messages.

        Raises:
            ValueError: a column is missing, or is mapped twice.
        """
        names = {}
        for ours, theirs in {"prompt": "prompt", **self.columns}.items():
            options = [theirs] if isinstance(theirs, str) else theirs
            present = [name for name in options if name in rows.column_names]
            if not present:
                raise ValueError(
                    f"{where} has no column {' or '.join(map(repr, options))}, only "
                    f"{sorted(rows.column_names)}. Name the column in data.format.columns, for "
                    f"example {{{ours}: {rows.column_names[0]}}}."
                )
            names[ours] = present[0]
        used = set(names.values())
        if len(used) < len(names):
            raise ValueError(f"data.format.columns={names} maps a column of {where} twice.")
        replaced = [ours for ours in names if ours in rows.column_names and ours not in used]
        # All at once, so that two columns can be swapped.
        return rows.remove_columns(replaced).rename_columns(
            {theirs: ours for ours, theirs in names.items() if ours != theirs}
        )

    def render(self, source: str | list[Message], tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Return the token ids of a prompt.

        Args:
            source: text or chat messages.
            tokenizer: the policy's.

        Raises:
            ValueError: the source is empty or of another type, or a chat template is needed and
                the tokenizer has none.
        """
        if not source or not isinstance(source, str | list):
            raise ValueError(
                f"data: the prompt of a row is {source!r}, neither text nor chat messages. Remove "
                "the row, or name the column of the prompts in data.format.columns."
            )
        has_template = tokenizer.chat_template is not None
        wants_chat = has_template if self.chat_template is None else self.chat_template
        is_chat = wants_chat or isinstance(source, list)
        if is_chat and not has_template:
            raise ValueError(
                "data: the prompts are chat messages (or data.format.chat_template is true), but "
                "the tokenizer has no chat template. Use text prompts or another tokenizer."
            )
        chat = source if isinstance(source, list) else [{"role": "user", "content": source}]
        messages = [dict(message) for message in chat]
        messages[-1]["content"] = self.template.replace("{prompt}", messages[-1]["content"])
        if not is_chat:
            head = "" if self.system_prompt is None else f"{self.system_prompt}\n\n"
            return list(tokenizer(head + messages[0]["content"])["input_ids"])
        if self.system_prompt is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **self.chat_template_args
        )
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
