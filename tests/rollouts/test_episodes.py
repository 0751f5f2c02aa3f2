"""Episodes: turns of a scripted engine, and environments that answer, fail and reward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from games import Hostile, Sum, Unkept, shout
from players import END, save_tokenizer
from prl_lightning.data import PromptDataModule
from prl_lightning.environments import Environments, TextTools
from prl_lightning.rewards import EnvironmentReward, RewardLimits, RewardSum
from prl_lightning.rollouts.episodes import Episodes
from prl_lightning.rollouts.settings import RolloutSettings
from prl_lightning.sampling import HFSampler, SamplingConfig
from prl_lightning.types import Completion, Prompt

pytestmark = pytest.mark.process

LIMITS = RewardLimits(seconds=0.5, memory_mib=256, workers=2)
Open = Callable[..., Episodes]
# By the seed of the first turn: the turns of an episode. Later ones are those of its group.
Script = Mapping[int, Sequence[str]]


class Engine:
    """Writes the turns of a script; keeps what it was asked."""

    def __init__(self, data: PromptDataModule, script: Script) -> None:
        self.tokenizer = data.tokenizer
        self.script = script
        self.asked: list[list[Prompt]] = []

    def __call__(
        self, prompts: list[Prompt], config: SamplingConfig, on_progress: Any = None
    ) -> list[list[Completion]]:
        turn = len(self.asked)
        self.asked.append(prompts)
        groups = [
            [self._turn(self.script[self._seed(one) + number][turn]) for number in range(config.n)]
            for one in prompts
        ]
        if on_progress is not None:
            on_progress({0: groups[0]}, sum(one.length for group in groups for one in group))
        return groups

    def _seed(self, prompt: Prompt) -> int:
        """Of the first turn, which has the same row."""
        return next(one.seed for one in self.asked[0] if one.columns is prompt.columns)

    def _turn(self, text: str) -> Completion:
        ids = self.tokenizer(text)["input_ids"]
        finished = not text.endswith("...")
        return Completion(ids, [-1.0] * len(ids), finished)


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def start(tokenizer_folder: str) -> Iterator[Open]:
    started: list[Episodes] = []

    def make(environments: Any = Sum, max_new_tokens: int = 200, **options: Any) -> Episodes:
        acting = Environments(environments, **{"format": TextTools()} | options)
        data = PromptDataModule(tokenizer_folder, environments=acting)
        data.setup("validate")
        rewards = RewardSum([EnvironmentReward()])
        settings = RolloutSettings(rewards, HFSampler(), 1.0, max_new_tokens, None, False, LIMITS)
        started.append(Episodes(data, settings))
        return started[-1]

    yield make
    for one in started:
        one.stop()


def prompt_of(episodes: Episodes, seed: int = 0, **columns: Any) -> Prompt:
    prompt = Prompt([], "Reach the goal from ", {"goal": 5} | columns, seed)
    return replace(prompt, token_ids=episodes.data.tokenizer(prompt.source)["input_ids"])


def config_of(episodes: Episodes, n: int = 1) -> SamplingConfig:
    (end,) = episodes.data.tokenizer(END)["input_ids"]
    return SamplingConfig(n, 1.0, episodes.max_new_tokens, (end,))


def play(
    episodes: Episodes, script: Script, n: int = 1, on_progress: Any = None
) -> tuple[Engine, list[Prompt], list[list[Completion]]]:
    """One group of n for every n-th seed of the script."""
    engine = Engine(episodes.data, script)
    prompts = episodes.open([prompt_of(episodes, seed) for seed in sorted(script)[::n]])
    groups = episodes.sample(engine, prompts, config_of(episodes, n), on_progress)
    return engine, prompts, groups


def test_a_turn_continues_the_tokens_of_the_one_before(start: Open) -> None:
    episodes = start()
    turns = ["<call>add 1</call>", "Then <call>add 1</call>", f"done{END}"]
    engine, (prompt,), ((completion,),) = play(episodes, {0: turns})
    begun = int(prompt.source[-2])  # "Reach the goal from 2?"
    decode = episodes.data.tokenizer.decode
    said = [f"{begun + 1}\n", f"{begun + 2}\n"]
    assert decode(completion.token_ids) == turns[0] + said[0] + turns[1] + said[1] + turns[2]
    sampled = [t for t, own in zip(completion.token_ids, completion.is_sampled, strict=True) if own]
    assert decode(sampled) == "".join(turns)
    assert completion.is_sampled[0]
    assert completion.is_sampled[-1]
    expected = [-1.0 if own else 0.0 for own in completion.is_sampled]
    assert completion.logprobs == expected
    assert completion.finished
    # Each call of the engine gets exactly the tokens so far.
    for asked in engine.asked:
        whole = prompt.token_ids + completion.token_ids
        assert asked[0].token_ids == whole[: len(asked[0].token_ids)]
    lengths = [len(asked[0].token_ids) - len(prompt.token_ids) for asked in engine.asked]
    assert lengths == [0, len(turns[0] + said[0]), len(turns[0] + said[0] + turns[1] + said[1])]
    assert len({asked[0].seed for asked in engine.asked}) == 3
    roles = [message["role"] for message in completion.messages]
    assert roles == ["assistant", "tool", "assistant", "tool", "assistant"]
    assert completion.messages[1] == {"role": "tool", "name": "add", "content": f"{begun + 1}"}
    assert completion.environment_reward == float(begun + 2 == 5)


def test_a_group_shares_its_start_and_a_seed_repeats_it(start: Open) -> None:
    script = {seed: [f"<call>add {seed % 2 + 3}</call>", END] for seed in range(8)}
    episodes = start()
    _, prompts, groups = play(episodes, script, n=2)
    assert {prompt.source[-2:] for prompt in prompts} <= {"0?", "1?", "2?"}
    assert len({prompt.source for prompt in prompts}) > 1
    for prompt, group in zip(prompts, groups, strict=True):
        begun = int(prompt.source[-2])
        totals = [begun + 3, begun + 4]
        assert [one.environment_reward for one in group] == [float(t == 5) for t in totals]
    # As another rank, or a continued run, would do it: some of them, in another order.
    again = start()
    engine = Engine(again.data, script)
    some = again.open([prompt_of(again, seed) for seed in (6, 2)])
    assert some == [prompts[3], prompts[1]]
    assert again.sample(engine, some, config_of(again, 2)) == [groups[3], groups[1]]


def test_limits_of_turns_and_tokens(start: Open) -> None:
    """The last call is made, since it may earn the reward; its result is read by nobody."""
    episodes = start(max_turns=2, turn_tokens=20)
    call = "<call>add 1</call>"
    script = {0: [call, call], 1: ["<call>add...", ""], 2: [call, "so..."], 3: [call, END]}
    _, _, groups = play(episodes, script)
    by_turns, by_first, by_second, whole = (group[0] for group in groups)
    assert [one.finished for one in (by_turns, by_first, by_second, whole)] == [False] * 3 + [True]
    assert by_turns.is_sampled[-1]
    assert [m["role"] for m in by_turns.messages] == ["assistant", "tool", "assistant", "tool"]
    assert by_first.length == len("<call>add...")
    # No further turn would fit into the episode.
    (short,) = play(start(max_new_tokens=38, turn_tokens=20), {0: [call]})[2]
    assert not short[0].finished
    assert short[0].length == len(call)
    assert play(start(max_new_tokens=40, turn_tokens=20), {0: [call, END]})[2][0][0].finished


def test_an_environment_that_is_done_ends_the_episode(start: Open) -> None:
    _, _, ((completion,),) = play(start(), {0: ["<call>add 9</call>"]})
    assert completion.finished
    assert completion.environment_reward == 0.0


def test_a_bad_episode_costs_itself_alone(start: Open) -> None:
    good = ["<call>add 2</call>", END]
    bad = {
        "hang": "time: ",
        "leave": "died: ",
        "fill": "memory: ",
        "fail": "error: out of order",
        "flood": "7" * 32,
        "nothing": "error: there is no tool 'nothing', only add, fail, fill, flood, hang, leave",
        "add": "error: missing a required argument: 'number'",
        "get_reward": "error: there is no tool 'get_reward'",
    }
    script = {0: good, 9: good} | {
        seed: [f"<call>{name}</call>", END] for seed, name in enumerate(bad, 1)
    }
    episodes = start(Hostile, result_tokens=32, max_new_tokens=400)
    _, _, groups = play(episodes, script)
    found = [group[0] for group in groups]
    alone = play(start(Hostile, result_tokens=32), {0: good})[2]
    assert found[0] == alone[0][0]
    assert found[-1].finished
    assert not found[-1].failure
    for completion, (name, outcome) in zip(found[1:-1], bad.items(), strict=True):
        if outcome.startswith(("time", "died", "memory")):
            assert completion.failure.startswith(outcome), name
            assert not completion.finished
            assert completion.length == len(f"<call>{name}</call>")
        else:
            assert not completion.failure, name
            assert completion.finished
            assert completion.messages[1]["content"] == outcome[:32]
            assert completion.call_errors == int(outcome.startswith("error"))
            assert completion.environment_reward == 0.0


def test_what_cannot_be_pickled_is_said(start: Open) -> None:
    _, _, ((completion,),) = play(start(Unkept), {0: ["<call>add 2</call>"]})
    assert "TypeError: Unkept cannot be pickled" in completion.failure
    assert "__getstate__" in completion.failure
    assert completion.length > 0


def test_progress_has_finished_groups_with_their_rewards(start: Open) -> None:
    script = {0: [END], 1: ["<call>add 1</call>", END]}
    reports: list[tuple[dict[int, list[Completion]], int]] = []
    episodes = start()
    _, _, groups = play(episodes, script, on_progress=lambda *one: reports.append(one))
    finished = [sorted(groups) for groups, _ in reports if groups]
    assert finished == [[0], [1]]
    assert {row: group for some, _ in reports for row, group in some.items()} == dict(
        enumerate(groups)
    )
    sampled = sum(one.num_sampled for group in groups for one in group)
    assert sum(tokens for _, tokens in reports) == sampled


def test_ranks_that_share_an_engine_call_it_equally_often(
    start: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This rank's episode is over, but another one's has two further turns."""
    elsewhere = iter([1, 1, 0])
    monkeypatch.setattr(
        "prl_lightning.rollouts.episodes.max_over_ranks", lambda own: max(own, next(elsewhere))
    )
    episodes = start()
    episodes._in_step = True
    engine, _, ((completion,),) = play(episodes, {0: [END]})
    assert [len(asked) for asked in engine.asked] == [1, 0, 0]
    assert completion.finished


def test_tools_without_an_environment(start: Open) -> None:
    episodes = start(None, tools=[shout])
    _, (prompt,), ((completion,),) = play(episodes, {0: ["<call>shout four</call>", END]})
    assert prompt == prompt_of(episodes)
    assert completion.messages[1]["content"] == "FOUR"
    assert completion.environment_reward is None


def test_a_column_names_one_of_several_environments(start: Open) -> None:
    episodes = start({"sum": Sum, "hostile": Hostile})
    names = ("sum", "hostile")
    prompts = [prompt_of(episodes, seed, environment=names[seed]) for seed in (0, 1)]
    engine = Engine(episodes.data, {seed: ["<call>fail</call>", END] for seed in (0, 1)})
    groups = episodes.sample(engine, episodes.open(prompts), config_of(episodes))
    contents = [group[0].messages[1]["content"] for group in groups]
    assert contents == ["error: there is no tool 'fail', only add", "error: out of order"]
    with pytest.raises(ValueError, match="'environment' is None.*sum, hostile"):
        episodes.open([prompt_of(episodes)])
