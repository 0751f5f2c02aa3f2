"""Read prompts from files and from the Hub, in TRL's and in verl's columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, config, load_dataset
from datasets.exceptions import DatasetGenerationError
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import Dataset as TorchDataset
from transformers import PreTrainedTokenizerBase

from prl_lightning.types import Message, Prompt

FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
TOKEN_IDS = "prompt_token_ids"


@dataclass(frozen=True)
class Source:
    """Where rows come from.

    Attributes:
        path: a JSON, JSON-lines or Parquet file, a folder of such, or a dataset on the Hub.
        name: the Hub dataset's configuration, where it has several.
        split: the Hub dataset's split.
    """

    path: str
    name: str | None = None
    split: str = "train"

    @classmethod
    def parse(cls, text: str) -> Source:
        """Read the short form that configurations use.

        Args:
            text: a file, or ``owner/dataset[/name][:split]`` of the Hub.

        Example:
            >>> Source.parse("data/train.jsonl")
            Source(path='data/train.jsonl', name=None, split='train')
            >>> Source.parse("openai/gsm8k/main:test")
            Source(path='openai/gsm8k', name='main', split='test')
        """
        if Path(text).suffix in FORMATS or Path(text).expanduser().exists():
            return cls(text)
        dataset, _, split = text.partition(":")
        owner, _, rest = dataset.partition("/")
        name, _, configuration = rest.partition("/")
        return cls(f"{owner}/{name}" if name else owner, configuration or None, split or "train")

    def check(self) -> None:
        """Look whether it can be there, without reading it.

        Raises:
            FileNotFoundError: a file that is not there.
            ValueError: a split of a file.
        """
        file = Path(self.path).expanduser()
        if file.suffix in FORMATS and self.split != "train":
            raise ValueError(
                f"data: {self.path}:{self.split} names a split, but a file has none. Leave it out."
            )
        if file.suffix in FORMATS and not file.is_file():
            raise FileNotFoundError(f"data: there is no file {self.path!r}.")

    def load(self) -> Dataset:
        """Read the rows.

        Raises:
            FileNotFoundError: a file that is not there.
            ValueError: it has no rows, or is not in a format that is read.
        """
        self.check()
        file = Path(self.path).expanduser()
        if file.suffix in FORMATS:
            return self._load_file(file)
        if file.is_file():
            raise ValueError(
                f"data: {self.path!r} is not read: use one of {', '.join(FORMATS)}, or a dataset "
                "on the Hub."
            )
        rows = load_dataset(self.path, self.name, split=self.split)
        if len(rows) == 0:
            raise ValueError(f"data: {self.path!r} has no rows.")
        return rows

    def _load_file(self, file: Path) -> Dataset:
        form = FORMATS[file.suffix]
        # A file of the user's is nobody else's business: `datasets` would report its every load.
        config.HF_UPDATE_DOWNLOAD_COUNTS = False
        try:
            return load_dataset(form, data_files=str(file), split="train")
        # An empty file fails in a way of its own in each format.
        except (DatasetGenerationError, StopIteration, ValueError) as error:
            cause = error.__cause__ or error
            raise ValueError(
                f"data: {self.path!r} has no rows that can be read as {form}: {cause!r}."
            ) from error


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


class PromptSet(TorchDataset[Prompt]):
    """The prompts of one source: renders once, gives ``Prompt`` objects by index.

    Args:
        source: where the rows come from.
        form: how they are rendered.
        tokenizer: the policy's.
        max_prompt_tokens: longer prompts are left out, with a count.
        where: the field of the configuration it stands in, for messages.

    Raises:
        ValueError: a column is missing, or every prompt is too long.
    """

    def __init__(
        self,
        source: Source,
        form: PromptFormat,
        tokenizer: PreTrainedTokenizerBase,
        max_prompt_tokens: int,
        where: str,
    ) -> None:
        rows = form.rename(source.load(), f"{where} ({source.path})")
        rows = rows.map(
            lambda prompt: {TOKEN_IDS: form.render(prompt, tokenizer)},
            input_columns="prompt",
            desc=f"{where}: rendering prompts",
        )
        lengths = [len(ids) for ids in rows[TOKEN_IDS]]
        kept = [row for row, length in enumerate(lengths) if length <= max_prompt_tokens]
        if len(kept) < len(rows):
            rank_zero_info(
                f"{where}: {len(rows) - len(kept)} of {len(rows)} prompts are longer than "
                f"data.max_prompt_tokens={max_prompt_tokens} and were left out."
            )
        if not kept:
            raise ValueError(
                f"{where} ({source.path}): every prompt is longer than data.max_prompt_tokens="
                f"{max_prompt_tokens}; the shortest has {min(lengths)} tokens."
            )
        self.rows = rows.select(kept)

    def __len__(self) -> int:
        """Number of prompts."""
        return len(self.rows)

    def __getitem__(self, index: int) -> Prompt:
        """The prompt of a row, with every other column of it."""
        columns = dict(self.rows[index])
        token_ids, source = columns.pop(TOKEN_IDS), columns.pop("prompt")
        return Prompt(token_ids, source, columns | _verl_answer(columns))

    @property
    def column_names(self) -> set[str]:
        """Columns that reward functions can have."""
        return set(self[0].columns)


def _verl_answer(columns: Mapping[str, Any]) -> dict[str, Any]:
    """The reference answer of a row in verl's form, under TRL's usual name."""
    reward_model = columns.get("reward_model")
    if "answer" in columns or not isinstance(reward_model, Mapping):
        return {}
    truth = reward_model.get("ground_truth")
    return {} if truth is None else {"answer": truth, "ground_truth": truth}
