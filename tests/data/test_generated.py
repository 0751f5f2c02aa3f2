import json
from pathlib import Path
from typing import Any

import pytest

from prl_lightning.data import DataError, PromptDataModule, PromptSource
from prl_lightning.evaluation import Evaluation

from .tokenizers import character_tokenizer


class Numbers(PromptSource):
    """Numbers below a limit; the first attempts give the lower ones."""

    def __init__(self, size: int, limit: int, length: int = 1) -> None:
        self.size = size
        self.limit = limit
        self.length = length

    def __len__(self) -> int:
        return self.size

    def row(self, position: int, attempt: int) -> dict[str, Any]:
        number = (position // 2 + attempt) % self.limit
        return {"prompt": f"{number}" * self.length, "answer": number}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    character_tokenizer().save_pretrained(folder)
    return str(folder)


def prepared(tokenizer: str, train: Any, sets: dict[str, Any], **options: Any) -> PromptDataModule:
    sizes = {"prompts_per_epoch": 4, "group_size": 2} | options
    data = PromptDataModule(tokenizer, train, Evaluation(sets), **sizes)
    data.setup("fit")
    return data


def taken(data: PromptDataModule, epochs: int = 1) -> list[str]:
    prompts = []
    for _ in range(epochs):
        prompts += data.next_prompts()
        data.advance()
    return [str(prompt.source) for prompt in prompts]


def test_an_evaluation_set_has_each_problem_once(tokenizer: str) -> None:
    data = prepared(tokenizer, Numbers(8, 100), {"held": Numbers(6, 100)})
    assert [p.source for p in data.eval_prompts["held"]] == ["0", "1", "2", "3", "4", "5"]
    assert data.eval_prompts["held"][2].columns == {"answer": 2}
    assert data.reward_columns["data.train (Numbers)"] == {"answer"}


def test_training_has_no_problem_of_any_evaluation_set(tokenizer: str, tmp_path: Path) -> None:
    file = tmp_path / "held.jsonl"
    file.write_text(json.dumps({"prompt": " 3\n", "answer": 3}) + "\n")
    sets = {"made": Numbers(2, 100), "file": str(file)}
    data = prepared(tokenizer, Numbers(8, 100), sets)
    # Positions 0 to 7 are 0 0 1 1 2 2 3 3; 0, 1 and 3 are held out.
    assert sorted(taken(data, epochs=2)) == ["2"] * 6 + ["4"] * 2


def test_the_question_decides_what_is_the_same_problem(tokenizer: str) -> None:
    class Asked(Numbers):
        def row(self, position: int, attempt: int) -> dict[str, Any]:
            row = super().row(position, attempt)
            return {"prompt": f"Think! {row['prompt']}", "question": row["prompt"]}

    data = prepared(tokenizer, Asked(4, 100), {"made": Numbers(1, 100)})
    assert "Think! 0" not in taken(data)


def test_long_rows_are_passed_over(tokenizer: str) -> None:
    data = prepared(tokenizer, Numbers(4, 20, length=3), {}, max_prompt_tokens=4)
    assert {len(text) for text in taken(data)} == {3}
    with pytest.raises(DataError, match=r"data\.train \(Numbers\).*max_prompt_tokens=3"):
        prepared(tokenizer, Numbers(4, 20, length=3), {}, max_prompt_tokens=3)


def test_too_few_problems_end_in_a_message(tokenizer: str) -> None:
    with pytest.raises(DataError, match=r"evaluation\.sets\.all \(Numbers\).* position 5"):
        prepared(tokenizer, Numbers(4, 5), {"all": Numbers(6, 5)})
    with pytest.raises(DataError, match=r"data\.train \(Numbers\).* position 0"):
        prepared(tokenizer, Numbers(4, 5), {"all": Numbers(5, 5)})


def test_a_row_that_cannot_be_made_is_passed_over(tokenizer: str) -> None:
    class Fails(Numbers):
        def row(self, position: int, attempt: int) -> dict[str, Any]:
            if attempt < self.limit:
                raise IndexError("no such row")
            return super().row(position, attempt)

    assert len(taken(prepared(tokenizer, Fails(4, 3), {}))) == 4
    with pytest.raises(DataError, match=r"position 0.*IndexError: no such row"):
        prepared(tokenizer, Fails(4, 10**9), {})


def test_a_file_and_a_source_can_be_mixed(tokenizer: str, tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"f{row}"}) + "\n" for row in range(4)))
    data = prepared(tokenizer, [str(file), Numbers(4, 100)], {})
    assert sorted(taken(data, epochs=2)) == ["0", "0", "1", "1", "f0", "f1", "f2", "f3"]


def test_sources_are_checked_before_the_tokenizer_is_read() -> None:
    class Wrong(Numbers):
        def check(self) -> None:
            raise DataError("no such task")

    with pytest.raises(DataError, match="no such task"):
        prepared("no/tokenizer", Wrong(4, 5), {})
