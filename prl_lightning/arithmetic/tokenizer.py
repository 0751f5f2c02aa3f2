"""A tokenizer with one token per character, and one for the start of the answer's box."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from prl_lightning.arithmetic.problems import ANSWER_CLOSES, ANSWER_OPENS, OPERATIONS

PAD, EOS = "<pad>", "<eos>"
TOKENS = ["\n", *"0123456789", *OPERATIONS, "=", "?", ANSWER_OPENS, ANSWER_CLOSES]


def make_tokenizer() -> PreTrainedTokenizerFast:
    r"""Create the tokenizer of the arithmetic problem, in the Hugging Face format.

    Example:
        >>> tokenizer = make_tokenizer()
        >>> ids = tokenizer("3+5?\n\\boxed{8}")["input_ids"]
        >>> len(ids), tokenizer.decode(ids)
        (8, '3+5?\n\\boxed{8}')
    """
    # Byte-level without merges ("Ċ" is the byte of a newline). AutoTokenizer ignores the saved
    # pre-tokenizer of a Qwen2 model and uses Qwen2's own; these ids are the same with both.
    tokens = [PAD, EOS, *(token.replace("\n", "Ċ") for token in TOKENS)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(ANSWER_OPENS, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=PAD,
        clean_up_tokenization_spaces=False,
    )
