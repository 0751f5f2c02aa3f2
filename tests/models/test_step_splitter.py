"""StepSplitter against the decoded text of a completion."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from prl_lightning.arithmetic import make_tokenizer
from prl_lightning.models.step_splitter import Steps, StepSplitter

TEXTS = [
    "One.\nTwo.\n\nThree",
    "One\n\n\nTwo\n",
    "\n\nOne. Two.\n \nThree.\n\n",
    "no line ends here",
    "One.\n\n\n\nTwo.\n\n.\n",
    "é\n\nü.\n",
]


@pytest.fixture(scope="module")
def byte_level() -> PreTrainedTokenizerBase:
    """Bytes merged as in GPT-2 and Qwen: a line end merges with the stop before it, or another."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    lines = [".\n", ".\n\n", "\n\n", "One.", "Two.", "Three."] * 50
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(lines, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def ends_by_text(tokenizer: PreTrainedTokenizerBase, ids: list[int], delimiter: str) -> list[bool]:
    """A token ends a step if its bytes complete a delimiter, or if it is the last."""
    pieces = [tokenizer.decode([token]) for token in ids]
    ends = []
    for place in range(len(ids)):
        before, upto = "".join(pieces[:place]), "".join(pieces[: place + 1])
        completed = [
            end
            for end in range(len(delimiter), len(upto) + 1)
            if upto[:end].endswith(delimiter) and end > len(before)
        ]
        ends.append(bool(completed) or place == len(ids) - 1)
    return ends


def split(
    splitter: StepSplitter, rows: list[list[int]], width: int | None = None
) -> list[list[bool]]:
    """Step ends of each row, padded with token 0 on the right."""
    width = width or max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[place < len(row) for place in range(width)] for row in rows])
    ends = splitter(ids, mask)
    assert ends is not None
    assert not ends[~mask].any()
    return [ends[row, : len(own)].tolist() for row, own in enumerate(rows)]


@pytest.mark.parametrize(("steps", "delimiter"), [("newline", "\n"), ("blank_line", "\n\n")])
def test_byte_level_steps_are_those_of_the_text(
    byte_level: PreTrainedTokenizerBase, steps: Steps, delimiter: str
) -> None:
    rows = [list(byte_level(text)["input_ids"]) for text in TEXTS]
    ends = split(StepSplitter(steps, byte_level), rows)
    assert ends == [ends_by_text(byte_level, row, delimiter) for row in rows]


def test_merged_line_ends_are_found(byte_level: PreTrainedTokenizerBase) -> None:
    """What one token id for a line end would miss, by hand."""
    rows = [
        [byte_level.convert_tokens_to_ids(token) for token in (".Ċ", "O", "ĊĊ", "O", ".ĊĊ", "O")]
    ]
    assert None not in rows[0]
    assert [byte_level.decode([token]) for token in rows[0]] == [
        ".\n",
        "O",
        "\n\n",
        "O",
        ".\n\n",
        "O",
    ]
    assert split(StepSplitter("newline", byte_level), rows) == [
        [True, False, True, False, True, True]
    ]
    assert split(StepSplitter("blank_line", byte_level), rows) == [
        [False, False, True, False, True, True]
    ]


def test_a_blank_line_over_two_tokens_ends_at_the_second(
    byte_level: PreTrainedTokenizerBase,
) -> None:
    rows = [[byte_level.convert_tokens_to_ids(token) for token in ("O", ".Ċ", "Ċ", "O", "Ċ", "O")]]
    assert split(StepSplitter("blank_line", byte_level), rows) == [
        [False, False, True, False, False, True]
    ]


@pytest.mark.parametrize(("steps", "delimiter"), [("newline", "\n"), ("blank_line", "\n\n")])
def test_character_steps_are_those_of_the_text(steps: Steps, delimiter: str) -> None:
    tokenizer = make_tokenizer()
    texts = ["3+5=8\n8*2=6\n", "3+5=8\n\n8*2=6", "\n\n\n3", "3", "3\n", "\n3\n\n"]
    rows = [list(tokenizer(text)["input_ids"]) for text in texts]
    ends = split(StepSplitter(steps, tokenizer), rows)
    assert ends == [ends_by_text(tokenizer, row, delimiter) for row in rows]


def test_a_blank_line_does_not_reach_over_the_end_of_a_completion() -> None:
    """The padding after a line end may itself be a line end."""
    tokenizer = make_tokenizer()
    (newline,) = tokenizer("\n")["input_ids"]
    ids = torch.tensor([[5, newline, newline, newline]])
    mask = torch.tensor([[True, True, False, False]])
    ends = StepSplitter("blank_line", tokenizer)(ids, mask)
    assert ends is not None
    assert ends.tolist() == [[False, True, False, False]]


@pytest.mark.parametrize("steps", ["newline", "blank_line"])
def test_a_row_of_the_model_without_a_token_ends_no_step(steps: Steps) -> None:
    """Embeddings are often padded beyond the vocabulary, and such an id can be sampled."""
    tokenizer = make_tokenizer()
    (newline,) = tokenizer("\n")["input_ids"]
    rows = [[newline, newline, len(tokenizer), len(tokenizer) + 100, 5]]
    ends = split(StepSplitter(steps, tokenizer), rows)
    assert ends == [[steps == "newline", True, False, False, True]]


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (1, [[True] * 5, [True] * 2]),
        (2, [[False, True, False, True, True], [False, True]]),
        (3, [[False, False, True, False, True], [False, True]]),
        (9, [[False] * 4 + [True], [False, True]]),
    ],
)
def test_fixed_lengths_by_hand(length: int, expected: list[list[bool]]) -> None:
    assert split(StepSplitter(length, make_tokenizer()), [[5] * 5, [5] * 2]) == expected


def test_the_token_form_has_no_steps() -> None:
    mask = torch.ones(1, 2, dtype=torch.bool)
    assert StepSplitter("token", make_tokenizer())(torch.ones(1, 2).long(), mask) is None


@pytest.mark.parametrize("steps", [0, -3])
def test_a_length_below_one_is_named(steps: int) -> None:
    with pytest.raises(ValueError, match=f"model.objective.steps={steps}: .*at least 1"):
        StepSplitter(steps, make_tokenizer())


def test_another_word_is_named_with_the_choices() -> None:
    with pytest.raises(ValueError, match="steps='sentence': .*'token'.*'newline' or 'blank_line'"):
        StepSplitter("sentence", make_tokenizer())  # type: ignore[arg-type]


@pytest.mark.parametrize("steps", ["newline", "blank_line"])
def test_a_tokenizer_without_line_ends_names_the_alternatives(steps: Steps) -> None:
    letters = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    )
    with pytest.raises(ValueError, match=r"contains '\\n'.*'token' or a number of tokens"):
        StepSplitter(steps, letters)
