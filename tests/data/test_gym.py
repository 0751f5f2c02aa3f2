import json
import math
import subprocess
import sys
from typing import Any

import pytest
import torch

from prl_lightning.data import Curriculum, DataError, GymTask, PromptDataModule, ReasoningGym
from prl_lightning.data.gym_tasks import HASH_ORDERED
from prl_lightning.evaluation import Evaluation
from prl_lightning.types import Completion, Prompt, Rollout

from .tokenizers import character_tokenizer

ONE_DIGIT = {"min_digits": 1, "max_digits": 1}
PRODUCTS = {"products": GymTask(config=ONE_DIGIT)}


def rewarded(task: str, *rewards: float) -> list[Rollout]:
    prompt, completion = Prompt([1], "?", {"task": task}), Completion([1], [0.0], finished=True)
    return [Rollout(prompt, completion, "", reward=reward) for reward in rewards]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    character_tokenizer().save_pretrained(folder)
    return str(folder)


def test_a_row_depends_on_seed_position_and_attempt_alone() -> None:
    tasks = {"products": GymTask(), "list_functions": GymTask(), "pool_matrix": GymTask()}
    first, again = ReasoningGym(tasks, size=4000), ReasoningGym(tasks, size=4000)
    places = [(0, 0), (3999, 0), (3999, 999), (7, 2), (8, 0), (9, 0)]
    rows = {place: first.row(*place) for place in places}
    assert {place: again.row(*place) for place in reversed(places)} == rows
    assert {row["task"] for row in rows.values()} == set(tasks)
    other = ReasoningGym(tasks, size=4000, seed=1)
    assert all(other.row(*place)["question"] != row["question"] for place, row in rows.items())


def test_a_row_has_the_columns_of_the_rewards() -> None:
    row = ReasoningGym(PRODUCTS, size=1, instruction="Be brief.").row(0, 0)
    assert row["prompt"] == f"{row['question']}\n\nBe brief."
    assert row["task"] == "products"
    assert row["answer"] == row["entry"]["answer"]
    assert row["config"].items() >= ONE_DIGIT.items()
    assert not {"seed", "size"} & row["config"].keys()
    assert ReasoningGym(PRODUCTS, size=1, instruction=None).row(0, 0)["prompt"] == row["question"]


def test_weights_are_the_shares_of_the_tasks() -> None:
    source = ReasoningGym({"gcd": GymTask(weight=3), "lcm": GymTask()}, size=400)
    names = [source.row(position, 0)["task"] for position in range(400)]
    assert 0.7 < names.count("gcd") / 400 < 0.8


def test_few_problems_are_shared_out_without_overlap(tokenizer: str) -> None:
    """There are about a hundred products of one digit."""
    data = PromptDataModule(
        tokenizer,
        ReasoningGym(PRODUCTS, size=400, seed=1),
        Evaluation({"held": ReasoningGym(PRODUCTS, size=60)}),
        prompts_per_epoch=400,
    )
    data.setup("fit")
    held = [prompt.columns["question"] for prompt in data.eval_prompts["held"]]
    trained = {prompt.columns["question"] for prompt in data.next_prompts()}
    assert len(set(held)) == 60
    assert 20 < len(trained) <= 40
    assert not trained & set(held)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ({"product": GymTask()}, r"no task 'product'\. The nearest are products"),
        ({"products": GymTask(config={"digits": 1})}, r"'digits'.*nearest are (m\w+_digits, ){2}"),
        ({"products": GymTask(config={"size": 9})}, r"no parameter 'size'"),
        ({"products": GymTask(config={"min_digits": 3, "max_digits": 1})}, r"'min_digits': 3.*max"),
        ({"products": GymTask(config={"min_digits": "a"})}, r"'min_digits': 'a'"),
        ({"products": GymTask(level=40)}, r"products has level=40: must be between 0 and \d"),
        ({"products": GymTask(level=0, config=ONE_DIGIT)}, r"\['max_digits', 'min_digits'\]"),
        ({"gsm_symbolic": GymTask(level=0)}, r"gsm_symbolic has level=0"),
        ({"products": GymTask(weight=0)}, r"products has weight=0"),
        ({"composite": GymTask()}, r"'composite'"),
        ({"ransom_note": GymTask()}, r"'ransom_note'.*PYTHONHASHSEED=0"),
    ],
)
def test_what_reasoning_gym_lacks_is_refused(tasks: dict[str, GymTask], message: str) -> None:
    with pytest.raises(DataError, match=message):
        ReasoningGym(tasks, size=4).check()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "size=0"),
        ({"size": 10**9}, "size=1000000000"),
        ({"seed": -1}, "seed=-1"),
        ({"tasks": {}}, "tasks={}"),
    ],
)
def test_values_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReasoningGym(**{"tasks": PRODUCTS, "size": 4} | settings)


def test_a_curriculum_needs_a_task_with_levels() -> None:
    with pytest.raises(DataError, match=r"curriculum .*\['products'\]"):
        ReasoningGym(PRODUCTS, size=4, curriculum=Curriculum()).check()
    with pytest.raises(ValueError, match=r"lower_below=0\.8.*raise_above=0\.8"):
        Curriculum(lower_below=0.8)
    with pytest.raises(ValueError, match=r"iterations=0"):
        Curriculum(iterations=0)


def test_every_level_is_checked_if_the_curriculum_may_reach_it() -> None:
    """Two of caesar_cipher's levels contradict its own limits."""
    tasks = {"caesar_cipher": GymTask(level=0)}
    ReasoningGym(tasks, size=4).check()
    with pytest.raises(DataError, match=r"'caesar_cipher' at level 2"):
        ReasoningGym(tasks, size=4, curriculum=Curriculum()).check()


def test_a_level_moves_with_the_mean_reward() -> None:
    tasks = {"products": GymTask(level=1), "gcd": GymTask(level=0), "lcm": GymTask()}
    source = ReasoningGym(tasks, size=64, curriculum=Curriculum(2, 0.75, 0.25))
    before = source.row(0, 0)
    values = source.observe(rewarded("products", 1.0, 1.0) + rewarded("lcm", 1.0))
    assert values["task_reward/products"] == 1
    assert math.isnan(values["task_reward/gcd"])
    assert {name: v for name, v in values.items() if "level/" in name} == {
        "level/products": 1,
        "level/gcd": 0,
    }
    assert source.levels == {"products": 1, "gcd": 0}  # one iteration is not enough
    source.observe(rewarded("products", 1.0, 0.0) + rewarded("gcd", 0.0))
    assert source.levels["products"] == 1  # 0.75 is not above 0.75
    source.observe(rewarded("products", 1.0, 1.0) + rewarded("gcd", 0.0))
    assert source.levels == {"products": 1, "gcd": 0}  # the last two: 0.5 and 1; 0 is the lowest
    source.observe(rewarded("products", 1.0))
    assert source.levels["products"] == 2
    source.observe(rewarded("products", 0.0))
    assert source.levels["products"] == 2  # what was before the change does not count
    source.observe(rewarded("products", 0.0))
    assert source.levels["products"] == 1
    assert source.row(0, 0) == before


def test_the_rewards_of_all_ranks_move_the_level(monkeypatch: pytest.MonkeyPatch) -> None:
    others = torch.tensor([[3.0], [3.0]], dtype=torch.float64)  # rewards and completions
    monkeypatch.setattr("prl_lightning.data.gym.sum_over_ranks", lambda own: own + others)
    source = ReasoningGym({"products": GymTask(level=0)}, size=1, curriculum=Curriculum(1, 0.7))
    assert source.observe(rewarded("products", 0.0))["task_reward/products"] == 0.75
    assert source.levels == {"products": 1}


def test_a_level_makes_the_rows_harder_and_stops_at_the_last() -> None:
    source = ReasoningGym({"products": GymTask(level=0)}, size=1, curriculum=Curriculum(1))
    configs = []
    for _ in range(20):
        configs.append(source.row(0, 0)["config"])
        source.observe(rewarded("products", 1.0))
    digits = [config["max_digits"] for config in configs]
    assert digits == sorted(digits)
    assert digits[0] < digits[-1] == digits[-2]


def test_a_continued_run_is_at_the_same_level(tokenizer: str) -> None:
    def made() -> PromptDataModule:
        source = ReasoningGym({"gcd": GymTask(level=0)}, size=64, curriculum=Curriculum(2))
        data = PromptDataModule(tokenizer, source, prompts_per_epoch=4)
        data.setup("fit")
        return data

    whole, continued = made(), made()
    for _ in range(3):
        whole.next_prompts()
        whole.advance(rewarded("gcd", 1.0))
    continued.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    for _ in range(3):
        expected = [prompt.source for prompt in whole.next_prompts()]
        assert [prompt.source for prompt in continued.next_prompts()] == expected
        logged = whole.advance(rewarded("gcd", 1.0))
        assert continued.advance(rewarded("gcd", 1.0)) == logged
    assert logged["level/gcd"] == 2


# Without this package, whose import takes longer. The tasks left out need seconds for a row.
ROWS = """
import hashlib, random
from reasoning_gym.factory import DATASETS, create_dataset
slow = {"arc_agi", "codeio", "composite", "figlet_font", "futoshiki", "group_anagrams",
        "acre", "knight_swap", "number_sequence", "rearc", "sokoban", "zebra_puzzles"}
rows = {}
for task in sorted(set(DATASETS) - slow):
    random.seed(0)
    dataset = create_dataset(task, seed=1, size=3)
    text = "".join(f"{dataset[i]['question']} {dataset[i]['answer']}" for i in range(3))
    rows[task] = hashlib.md5(text.encode()).hexdigest()
"""


@pytest.mark.process
def test_the_rows_of_other_tasks_are_the_same_in_another_process() -> None:
    own: dict[str, Any] = {}
    exec(ROWS, own)
    code = f"{ROWS}import json; print(json.dumps(rows))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    rows = json.loads(done.stdout[done.stdout.index("{") :])  # a task prints dots
    assert len(rows) > 90
    differing = {task for task, row in rows.items() if own["rows"][task] != row}
    assert differing <= HASH_ORDERED
    assert differing
