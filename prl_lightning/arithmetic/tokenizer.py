"""One token a character."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from prl_lightning.arithmetic.problems import ANSWER_MARK, OPERATIONS

PAD, EOS = "<pad>", "<eos>"
CHARACTERS = ["\n", *"0123456789", *OPERATIONS, "=", "?", ANSWER_MARK]


def make_tokenizer() -> PreTrainedTokenizerFast:
    r"""Tokenizer of the arithmetic problem, in the Hugging Face form that engines read.

    Example:
        >>> tokenizer = make_tokenizer()
        >>> ids = tokenizer("3+5?\n")["input_ids"]
        >>> len(ids), tokenizer.decode(ids)
        (5, '3+5?\n')
    """
    vocabulary = {token: index for index, token in enumerate([PAD, EOS, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
    )
