"""PromptFormat: how a row of the data becomes a prompt."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from prl_lightning.data.messages import read_prompt
from prl_lightning.types import Message

# Returns the descriptions of the tools that a row's chat template gets, by the row's columns.
ToolsOf = Callable[[Mapping[str, Any]], list[dict[str, Any]] | None]


class DataError(ValueError):
    """Data that cannot be used; the command line shows its message without a traceback."""


@dataclass(frozen=True)
class PromptFormat:
    """How a row becomes the text that the model continues.

    Attributes:
        system_prompt: put before the problem, as the system message of a chat or, without a chat
            template, as a separate paragraph. A row's own system message replaces it.
        template: text around the problem; the problem replaces ``{prompt}``. In a chat it goes
            around the last message of the user.
        chat_template: whether to apply the tokenizer's chat template. None applies it if there is
            one, but not to a text that begins with the BOS token: it is rendered already.
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

    def find_columns(self, names: Collection[str], where: str) -> dict[str, str]:
        """Return the columns of a source by this package's names.

        Args:
            names: of the columns in the data.
            where: field and source of the rows, for messages.

        Returns:
            For every column that is kept, its name here and its name in the data.

        Raises:
            DataError: a column is missing, or is mapped twice.
        """
        found = {}
        for ours, theirs in {"prompt": "prompt", **self.columns}.items():
            options = [theirs] if isinstance(theirs, str) else theirs
            present = [name for name in options if name in names]
            if not present:
                raise DataError(
                    f"{where} has no column {' or '.join(map(repr, options))}, only "
                    f"{sorted(names)}. Name the column in data.format.columns, for example "
                    f"{{{ours}: {next(iter(names), 'problem')}}}."
                )
            found[ours] = present[0]
        used = set(found.values())
        if len(used) < len(found):
            raise DataError(f"data.format.columns={found} maps a column of {where} twice.")
        return {name: name for name in names if name not in used} | found

    def render(
        self,
        source: Any,
        tokenizer: PreTrainedTokenizerBase,
        tools: list[dict[str, Any]] | None = None,
    ) -> list[int]:
        """Return the token ids of a prompt.

        Args:
            source: text or chat messages.
            tokenizer: the policy's.
            tools: descriptions for the chat template.

        Raises:
            ValueError: the source is not a prompt, the chat template refuses it, or one is needed
                and the tokenizer has none.
        """
        prompt = read_prompt(source)
        if isinstance(prompt, str):
            bos = tokenizer.bos_token or ""
            is_rendered = bool(bos) and prompt.startswith(bos)
            problem = prompt.removeprefix(bos)
            has_template = tokenizer.chat_template is not None
            by_default = has_template and not is_rendered
            if not (by_default if self.chat_template is None else self.chat_template):
                head = "" if self.system_prompt is None else f"{self.system_prompt}\n\n"
                start = bos if is_rendered else ""
                return _token_ids(start + head + self._around(problem), tokenizer)
            prompt = [{"role": "user", "content": problem}]
        return self._render_chat(prompt, tokenizer, tools)

    def _render_chat(
        self,
        prompt: list[Message],
        tokenizer: PreTrainedTokenizerBase,
        tools: list[dict[str, Any]] | None,
    ) -> list[int]:
        if tokenizer.chat_template is None:
            raise ValueError(
                "the prompt is chat messages (or data.format.chat_template is true), but "
                "the tokenizer has no chat template. Use text prompts or another tokenizer."
            )
        chat = self._complete(prompt)
        is_begun = prompt[-1]["role"] == "assistant"  # the model continues that message
        try:
            text = tokenizer.apply_chat_template(
                chat,
                tokenize=False,
                add_generation_prompt=not is_begun,
                continue_final_message=is_begun,
                tools=tools,
                **self.chat_template_args,
            )
        except Exception as error:  # a template is a program
            raise ValueError(f"the chat template raised {type(error).__name__}: {error}") from error
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    def _complete(self, prompt: list[Message]) -> list[Message]:
        """Add the system message, and the template around the last message of the user."""
        asked = [index for index, message in enumerate(prompt) if message["role"] == "user"]
        if not asked and self.template != "{prompt}":
            raise ValueError(
                f"the prompt has no message of role 'user' for data.format.template="
                f"{self.template!r}. Leave the template out, or add such a message."
            )
        chat = list(prompt)
        for index in asked[-1:]:
            chat[index] = chat[index] | {"content": self._around(chat[index]["content"])}
        if self.system_prompt is not None and chat[0]["role"] != "system":
            chat.insert(0, {"role": "system", "content": self.system_prompt})
        return chat

    def _around(self, problem: str) -> str:
        return self.template.replace("{prompt}", problem)


def _token_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokenize a text that the model continues.

    The tokens that the tokenizer puts before a text are there once, also if the text has them. The
    tokens that it puts after a text, such as EOS, are left out.
    """
    own = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not tokenizer.num_special_tokens_to_add():
        return own
    whole = list(tokenizer(text)["input_ids"])
    starts = (i for i in range(len(whole)) if whole[i : i + len(own)] == own)
    before = whole[: next(starts, 0)]
    return own if own[: len(before)] == before else before + own
