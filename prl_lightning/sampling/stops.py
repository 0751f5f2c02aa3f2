"""What ends a completion besides the model's own end-of-sequence tokens: `rollout.stop`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

_ANSWER = "An answer"


def split_stops(
    stop: Sequence[str | int], tokenizer: PreTrainedTokenizerBase
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Split stops into token ids and texts.

    Args:
        stop: token ids and texts. A text that is a special token counts as its id: the engine then
            need not decode every token.
        tokenizer: the policy's.
    """
    special = {
        str(token): index
        for index, token in tokenizer.added_tokens_decoder.items()
        if token.special
    }
    known = [special.get(one, one) if isinstance(one, str) else one for one in stop]
    ids = tuple(one for one in known if isinstance(one, int))
    return ids, tuple(one for one in known if isinstance(one, str))


def decode(
    token_ids: list[int], tokenizer: PreTrainedTokenizerBase, stop_texts: Sequence[str]
) -> str:
    """Decode a completion without special tokens and without the stop text that ended it.

    Args:
        token_ids: of the completion.
        tokenizer: the policy's.
        stop_texts: the texts that end a completion.
    """
    text: str = tokenizer.decode(token_ids, skip_special_tokens=True)
    return text[: min((text.find(stop) for stop in stop_texts if stop in text), default=None)]


def turn_end(
    tokenizer: PreTrainedTokenizerBase, template_args: Mapping[str, Any]
) -> tuple[str, list[int]] | None:
    """Return what the chat template puts after an assistant's message, as text and tokens.

    Args:
        tokenizer: the policy's.
        template_args: extra arguments of the chat template.

    Returns:
        The first added token, such as "<|im_end|>", or else the text; None if there is neither, or
        no chat template.
    """
    if tokenizer.chat_template is None:
        return None
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False, **template_args)
    except TemplateError:  # of a template that refuses such a chat
        return None
    tail = text.rpartition(_ANSWER)[2].strip()
    ids = list(tokenizer(tail, add_special_tokens=False)["input_ids"])
    added = tokenizer.added_tokens_decoder
    first = next(([index] for index in ids if index in added), ids)
    return (tokenizer.decode(first), first) if first else None
