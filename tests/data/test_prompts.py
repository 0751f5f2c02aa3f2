import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from prl_lightning.data import PromptDataModule
from prl_lightning.data.sizes import EpochSizes
from prl_lightning.evaluation import Evaluation
from prl_lightning.types import Prompt

from .tokenizers import character_tokenizer

MakeData = Callable[..., PromptDataModule]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, twelve prompts "0" to "11", five "a0" to "a4", and three "b0" to "b2"."""
    folder = tmp_path_factory.mktemp("prompts")
    character_tokenizer().save_pretrained(folder / "tokenizer")
    for name, prefix, count in (("train", "", 12), ("a", "a", 5), ("b", "b", 3)):
        rows = [{"prompt": f"{prefix}{row}", "answer": row, name: name} for row in range(count)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines)
    return folder


@pytest.fixture(scope="module")
def make_data(folder: Path) -> MakeData:
    def make(
        rank: int = 0,
        ranks: int = 1,
        accumulate: int = 1,
        train: str = "train",
        stage: str = "fit",
        eval_sets: str = "",
        **options: Any,
    ) -> PromptDataModule:
        sizes = {"prompts_per_epoch": 4, "group_size": 2, "updates_per_epoch": 1} | options
        sets = {name: str(folder / f"{name}.jsonl") for name in eval_sets}
        sources = [str(folder / f"{name}.jsonl") for name in train.split()]
        data = PromptDataModule(str(folder / "tokenizer"), sources, Evaluation(sets), **sizes)
        data.trainer = SimpleNamespace(  # type: ignore[assignment]
            global_rank=rank, world_size=ranks, accumulate_grad_batches=accumulate
        )
        data.setup(stage)
        return data

    return make


def take(data: PromptDataModule) -> list[Prompt]:
    prompts = data.next_prompts()
    data.advance()
    return prompts


def epochs(data: PromptDataModule, count: int) -> list[list[Any]]:
    return [[prompt.source for prompt in take(data)] for _ in range(count)]


# The stream


@pytest.mark.parametrize("prompts_per_epoch", [5, 12])
def test_every_pass_is_another_permutation(make_data: MakeData, prompts_per_epoch: int) -> None:
    data = make_data(prompts_per_epoch=prompts_per_epoch)
    stream = sum(epochs(data, 36 // prompts_per_epoch + 1), [])
    passes = [stream[start : start + 12] for start in (0, 12, 24)]
    for one in passes:
        assert sorted(one, key=int) == [str(row) for row in range(12)]
    assert passes[0] != passes[1] != passes[2] != passes[0]
    # The position decides, not how the stream is cut into epochs; and the seed decides the order.
    assert stream[:36] == sum(epochs(make_data(prompts_per_epoch=1), 36), [])
    assert stream[:36] != sum(epochs(make_data(prompts_per_epoch=1, seed=4), 36), [])


@pytest.mark.parametrize("epochs_before", [1, 3, 7])
def test_a_resumed_run_sees_the_same_prompts(make_data: MakeData, epochs_before: int) -> None:
    uninterrupted = epochs(make_data(prompts_per_epoch=5), epochs_before + 4)
    stopped, resumed = make_data(prompts_per_epoch=5), make_data(prompts_per_epoch=5)
    epochs(stopped, epochs_before)
    epochs(resumed, 1)
    resumed.load_state_dict(stopped.state_dict())
    assert epochs(resumed, 4) == uninterrupted[epochs_before:]


def test_several_sources_are_one_stream(make_data: MakeData) -> None:
    data = make_data(train="a b", prompts_per_epoch=8)
    for epoch in epochs(data, 3):
        assert sorted(epoch) == ["a0", "a1", "a2", "a3", "a4", "b0", "b1", "b2"]
    # A reward reads the columns of each source.
    assert list(data.reward_columns.values()) == [{"answer", "a"}, {"answer", "b"}]
    columns = {prompt.source: set(prompt.columns) for prompt in take(data)}
    assert columns["a0"] == {"answer", "a"}
    assert columns["b0"] == {"answer", "b"}


# Ranks


@pytest.mark.parametrize(("ranks", "updates"), [(2, 1), (2, 3), (3, 2), (4, 3)])
def test_ranks_share_the_prompts_of_each_update_with_the_seeds_of_one(
    make_data: MakeData, ranks: int, updates: int
) -> None:
    sizes = {"prompts_per_epoch": 12, "updates_per_epoch": updates}
    alone = make_data(**sizes)
    shares = [make_data(rank, ranks, **sizes) for rank in range(ranks)]
    size, share = 12 // updates, 12 // updates // ranks
    for _ in range(3):
        whole, parts = take(alone), [take(data) for data in shares]
        for update in range(updates):
            own = [part[update * share : (update + 1) * share] for part in parts]
            assert sum(own, []) == whole[update * size : (update + 1) * size]
        assert len({prompt.seed for prompt in whole}) == 12


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_evaluation_sets_are_split_without_loss_or_duplicate(
    make_data: MakeData, ranks: int
) -> None:
    expected = {"a": ["a0", "a1", "a2", "a3", "a4"], "b": ["b0", "b1", "b2"]}
    seen: dict[str, list[Any]] = {"a": [], "b": []}
    seeds: dict[Any, int] = {}
    for rank in range(ranks):
        data = make_data(rank, ranks, stage="validate", eval_sets="ab")
        for name, prompts in data.eval_prompts.items():
            # The same number on every rank, because the ranks take the same steps together.
            assert len(prompts) == math.ceil(len(expected[name]) / ranks)
            counted = [prompt for prompt in prompts if not prompt.is_padding]
            seen[name] += [prompt.source for prompt in counted]
            seeds |= {prompt.source: prompt.seed for prompt in counted}
            # A loader needs its length before anything is sampled.
            assert len(data.eval_buffers[name]) == len(prompts)
        assert not len(data.train_buffer)
    assert {name: sorted(sources) for name, sources in seen.items()} == expected
    # The seed of a prompt does not depend on the rank, and no two prompts share one.
    alone = make_data(stage="validate", eval_sets="ab").eval_prompts
    assert seeds == {prompt.source: prompt.seed for some in alone.values() for prompt in some}
    assert len(set(seeds.values())) == 8


def test_reward_columns_are_those_of_each_source(make_data: MakeData, folder: Path) -> None:
    train = {f"data.train ({folder / 'train.jsonl'})": {"answer", "train"}}
    held = {f"evaluation.sets.a ({folder / 'a.jsonl'})": {"answer", "a"}}
    assert make_data().reward_columns == train
    assert make_data(eval_sets="a").reward_columns == train | held
    assert make_data(stage="validate", eval_sets="a").reward_columns == held


# Sizes


def test_a_buffer_has_one_item_a_micro_batch(make_data: MakeData) -> None:
    data = make_data(prompts_per_epoch=12, group_size=4, updates_per_epoch=3, accumulate=8)
    # 12 x 4 = 48 completions, 16 an update, 8 micro-batches of 2: 24 in all.
    assert len(data.train_dataloader()) == len(data.train_buffer) == 24


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            (10, 4, 3, 1, 1),
            r"data\.prompts_per_epoch \(10\).*data\.updates_per_epoch \(3\): "
            r"10 prompts x 4 completions = 40 .*/ 3 updates = 13\.3333 ",
        ),
        (
            (12, 4, 2, 4, 1),
            r"\(6\).*ranks \(4\): 12 prompts x 4 .* = 48 .*/ 2 updates = 24 .*/ 4 ranks = 6 ",
        ),
        (
            (12, 4, 2, 2, 5),
            r"\(12\).*accumulate_grad_batches \(5\).*/ 2 ranks = 12 .*/ 5 micro-batches = 2\.4 ",
        ),
        ((0, 4, 1, 1, 1), "data.prompts_per_epoch=0"),
        ((12, 0, 1, 1, 1), "data.group_size=0"),
        ((12, 4, -2, 1, 1), "data.updates_per_epoch=-2"),
        ((12, 4, 1, 1, 0), "trainer.accumulate_grad_batches=0"),
    ],
)
def test_sizes_that_are_below_one_or_do_not_divide_are_errors(
    sizes: tuple[int, int, int, int, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        EpochSizes(*sizes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranks": 3}, r"ranks \(3\)"),
        ({"accumulate": 3}, r"accumulate_grad_batches \(3\)"),
        ({"prompts_per_epoch": 13}, r"data\.prompts_per_epoch=13.* 12 "),
        ({"train": ""}, r"data\.train"),
    ],
    ids=str,
)
def test_the_data_module_checks_its_sizes(
    make_data: MakeData, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_data(**options)


def test_an_evaluation_needs_no_training_prompts_and_prepare_data_calls_prepare(
    make_data: MakeData,
) -> None:
    prepare = Mock()
    data = make_data(train="", stage="validate", eval_sets="a", prepare=prepare)
    assert data.eval_prompts["a"]
    assert not prepare.called
    data.prepare_data()
    prepare.assert_called_once_with()
