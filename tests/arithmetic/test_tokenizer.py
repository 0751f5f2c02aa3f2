from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from prl_lightning.arithmetic import make_tokenizer

PIECES = ["\n", *"0123456789+-*=?}", "\\boxed{"]
tokenizer = make_tokenizer()


@settings(deadline=None)
@given(st.lists(st.sampled_from(PIECES)))
def test_text_comes_back_and_every_piece_is_one_token(pieces: list[str]) -> None:
    ids = tokenizer("".join(pieces))["input_ids"]
    assert [tokenizer.decode([token]) for token in ids] == pieces
    assert tokenizer.decode(ids) == "".join(pieces)


def test_pieces_have_tokens_of_their_own() -> None:
    ids = [token for piece in PIECES for token in tokenizer(piece)["input_ids"]]
    assert len(set(ids)) == len(ids) == len(PIECES)
    special = {tokenizer.pad_token_id, tokenizer.eos_token_id}
    assert len(special) == 2
    assert not special & set(ids)
    assert sorted([*special, *ids]) == list(range(len(tokenizer)))


def test_the_end_of_a_sequence_is_one_token_that_decoding_leaves_out() -> None:
    *ids, last = tokenizer("3+5?" + tokenizer.eos_token)["input_ids"]
    assert last == tokenizer.eos_token_id
    assert tokenizer.decode([*ids, last], skip_special_tokens=True) == "3+5?"


def test_a_model_folder_gives_back_the_same_tokenizer(tied_model: str) -> None:
    """For Qwen2 models AutoTokenizer takes Qwen2's way to split a text, whatever was saved."""
    loaded = AutoTokenizer.from_pretrained(tied_model)
    text = "3+5*2?3+5=8\n\n8*2=6\n\\boxed{6}<eos>\n"
    ids = tokenizer(text)["input_ids"]
    assert loaded(text)["input_ids"] == ids
    assert loaded.decode(ids) == tokenizer.decode(ids) == text
    assert len(loaded) == len(tokenizer)
    for name in ("eos_token_id", "pad_token_id", "unk_token_id"):
        assert getattr(loaded, name) == getattr(tokenizer, name)
