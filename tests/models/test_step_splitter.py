"""StepSplitter against the decoded text of a completion."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from prl_lightning.arithmetic import make_tokenizer
from prl_lightning.models.step_splitter import DELIMITERS, Steps, StepSplitter

Tokenizers = dict[str, PreTrainedTokenizerBase]
TEXTS = {
    "bytes": [
        "One.\nTwo.\n\nThree",
        "One\n\n\nTwo\n",
        "\n\nOne. Two.\n \nThree.\n\n",
        "no line ends here",
        "One.\n\n\n\nTwo.\n\n.\n",
        "é\n\nü.\n",
    ],
    "characters": ["3+5=8\n8*2=6\n", "3+5=8\n\n8*2=6", "\n\n\n3", "3", "3\n", "\n3\n\n"],
}


@pytest.fixture(scope="module")
def tokenizers() -> Tokenizers:
    """Characters; and bytes, where a line end merges with a full stop or another line end."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    lines = [".\n", ".\n\n", "\n\n", "One.", "Two.", "Three."] * 50
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(lines, trainer)
    of_bytes = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False
    )
    return {"bytes": of_bytes, "characters": make_tokenizer()}


def ends_by_text(tokenizer: PreTrainedTokenizerBase, ids: list[int], delimiter: str) -> list[bool]:
    """A token ends a step if its text completes a delimiter, or if it is the last."""
    pieces = [tokenizer.decode([token]) for token in ids]
    ends = []
    for place in range(len(ids)):
        before, upto = "".join(pieces[:place]), "".join(pieces[: place + 1])
        ends.append(
            place == len(ids) - 1
            or any(upto[:end].endswith(delimiter) for end in range(len(before) + 1, len(upto) + 1))
        )
    return ends


def split(splitter: StepSplitter, rows: list[list[int]]) -> list[list[bool]]:
    """Step ends of each row, padded with token 0 on the right."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[place < len(row) for place in range(width)] for row in rows])
    ends = splitter(ids, mask)
    assert ends is not None
    assert not ends[~mask].any()
    return [ends[row, : len(own)].tolist() for row, own in enumerate(rows)]


@pytest.mark.parametrize("steps", DELIMITERS)
@pytest.mark.parametrize("kind", TEXTS)
def test_steps_are_those_of_the_text(tokenizers: Tokenizers, kind: str, steps: Steps) -> None:
    tokenizer = tokenizers[kind]
    rows = [list(tokenizer(text)["input_ids"]) for text in TEXTS[kind]]
    expected = [ends_by_text(tokenizer, row, DELIMITERS[str(steps)]) for row in rows]
    assert split(StepSplitter(steps, tokenizer), rows) == expected


@pytest.mark.parametrize(
    ("steps", "tokens", "expected"),
    [
        ("newline", [".\n", "O", "\n\n", "O", ".\n\n", "O"], [1, 0, 1, 0, 1, 1]),
        ("blank_line", [".\n", "O", "\n\n", "O", ".\n\n", "O"], [0, 0, 1, 0, 1, 1]),
        # A blank line over two tokens ends at the second.
        ("blank_line", ["O", ".\n", "\n", "O", "\n", "O"], [0, 0, 1, 0, 0, 1]),
    ],
)
def test_merged_and_divided_delimiters_by_hand(
    tokenizers: Tokenizers, steps: Steps, tokens: list[str], expected: list[int]
) -> None:
    tokenizer = tokenizers["bytes"]
    row = [tokenizer.convert_tokens_to_ids(token.replace("\n", "Ċ")) for token in tokens]
    assert [tokenizer.decode([token]) for token in row] == tokens
    assert split(StepSplitter(steps, tokenizer), [row]) == [[bool(end) for end in expected]]


def test_a_blank_line_ends_within_the_completion(tokenizers: Tokenizers) -> None:
    """The padding after a line end may itself be a line end."""
    (newline,) = tokenizers["characters"]("\n")["input_ids"]
    mask = torch.tensor([[True, True, False, False]])
    splitter = StepSplitter("blank_line", tokenizers["characters"])
    ends = splitter(torch.tensor([[5, newline, newline, newline]]), mask)
    assert ends is not None
    assert ends.tolist() == [[False, True, False, False]]


@pytest.mark.parametrize("steps", DELIMITERS)
def test_ids_without_a_token_end_no_step(tokenizers: Tokenizers, steps: Steps) -> None:
    """Embeddings are often padded beyond the vocabulary, and such an id can be sampled."""
    tokenizer = tokenizers["characters"]
    (newline,) = tokenizer("\n")["input_ids"]
    rows = [[newline, newline, len(tokenizer), len(tokenizer) + 100, 5]]
    expected = [[steps == "newline", True, False, False, True]]
    assert split(StepSplitter(steps, tokenizer), rows) == expected


def test_lengths_and_the_token_form(tokenizers: Tokenizers) -> None:
    splitter = StepSplitter(2, tokenizers["characters"])
    assert split(splitter, [[5] * 5, [5]]) == [[False, True, False, True, True], [True]]
    mask = torch.ones(1, 2, dtype=torch.bool)
    assert StepSplitter("token", tokenizers["characters"])(mask.long(), mask) is None


@pytest.mark.parametrize(
    ("steps", "message"),
    [(0, r"steps=0"), (-3, r"steps=-3"), ("sentence", r"steps='sentence'.*'newline'"),
     ("newline", r"steps='newline'.*'\\n'"), ("blank_line", r"steps='blank_line'.*'\\n'")],
)  # fmt: skip
def test_what_cannot_split_is_named(steps: Steps, message: str) -> None:
    """A length below 1, another word, or a tokenizer without line ends."""
    letters = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    with pytest.raises(ValueError, match=rf"model\.objective\.{message}"):
        StepSplitter(steps, PreTrainedTokenizerFast(tokenizer_object=letters))
