"""One token a character, and one for the start of the answer's box."""

from __future__ import annotations

import re

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from prl_lightning.arithmetic.problems import ANSWER_CLOSES, ANSWER_OPENS, OPERATIONS

PAD, EOS = "<pad>", "<eos>"
TOKENS = ["\n", *"0123456789", *OPERATIONS, "=", "?", ANSWER_OPENS, ANSWER_CLOSES]


def make_tokenizer() -> PreTrainedTokenizerFast:
    r"""Tokenizer of the arithmetic problem, in the Hugging Face form that engines read.

    Example:
        >>> tokenizer = make_tokenizer()
        >>> ids = tokenizer("3+5?\n\\boxed{8}")["input_ids"]
        >>> len(ids), tokenizer.decode(ids)
        (8, '3+5?\n\\boxed{8}')
    """
    vocabulary = {token: index for index, token in enumerate([PAD, EOS, *TOKENS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex(re.escape(ANSWER_OPENS) + r"|[\s\S]"), "isolated"
    )
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
    )
