"""Stops that a user names, and the chat template's end of a turn."""

import pytest
from transformers import PreTrainedTokenizerBase

from prl_lightning.arithmetic import make_tokenizer
from prl_lightning.sampling.stops import decode, split_stops, turn_end

TURNS = "{% for m in messages %}{{ m['role'] }}={{ m['content'] }}CLOSE{% endfor %}"


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    """With the special token "<|im_end|>" and the ordinary added token "<go>"."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.add_tokens(["<go>"])
    return tokenizer


def test_special_tokens_are_ids_and_other_texts_stay_texts(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    found = split_stops(["<|im_end|>", 7, "<go>", "1+", "<|im_end|>1"], tokenizer)
    assert found == ((end, 7), ("<go>", "1+", "<|im_end|>1"))


@pytest.mark.parametrize(
    ("stops", "expected"),
    [((), "3+5=8?2"), (("=8",), "3+5"), (("?", "5="), "3+"), (("7",), "3+5=8?2")],
)
def test_a_text_ends_before_the_stop_that_comes_first(
    tokenizer: PreTrainedTokenizerBase, stops: tuple[str, ...], expected: str
) -> None:
    ids = tokenizer("3+5=8?2<eos>")["input_ids"]
    assert decode(ids, tokenizer, stops) == expected


@pytest.mark.parametrize(
    ("close", "expected"),
    [("<|im_end|>\n", "<|im_end|>"), ("\n<eos>", "<eos>"), ("\n1+2\n", "1+2"), ("\n", None)],
)
def test_what_closes_a_turn(
    tokenizer: PreTrainedTokenizerBase, close: str, expected: str | None
) -> None:
    assert turn_end(tokenizer, {}) is None  # no chat template
    tokenizer.chat_template = TURNS.replace("CLOSE", close)
    found = turn_end(tokenizer, {})
    assert (found and found[0]) == expected
    tokenizer.chat_template = "{{ raise_exception('no assistant') }}"
    assert turn_end(tokenizer, {}) is None
