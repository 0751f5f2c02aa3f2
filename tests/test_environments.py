"""Runs with an environment: several ranks, a kill, a continued evaluation, bad settings."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from interruptions import Command, callback, differing
from prl_lightning.cli import main
from prl_lightning.runs.tables import read_table
from ranks import gap
from tiny_runs import ARITHMETIC, fit, metrics_of, tiny_overrides

pytestmark = pytest.mark.process

# The model writes a digit and "+", which is a call; the environment answers "=" and the sum.
ACTING = {
    "environments": "games.Sum",
    "format": {
        "class_path": "prl_lightning.environments.TextTools",
        "init_args": {"opens": "", "closes": "+", "result": "={result}\n", "tool": "add"},
    },
    "max_turns": 4,
    "turn_tokens": 4,
}


def options(folder: Path, **changes: Any) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    overlay = folder / "environments.yaml"
    overlay.write_text(yaml.safe_dump({"data": {"environments": ACTING | changes}}))
    rows = [{"prompt": f"{row}-1?", "goal": 4 + row % 9, "answer": "0"} for row in range(12)]
    data = folder / "games.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    heldout = folder / "heldout.jsonl"
    heldout.write_text("".join(f"{json.dumps(row)}\n" for row in rows[:3]))
    return [
        f"--config={overlay}",
        f"--data.train={data}",
        f"--evaluation.sets={{tiny: {heldout}}}",
        "--rollout.rewards=[prl_lightning.rewards.EnvironmentReward]",
        "--rollout.sampler=players.Player",
        "--rollout.max_engine_gap=1000",
        "--rollout.max_new_tokens=40",
    ]


def test_ranks_and_a_kill_change_nothing(tied_model: str, tmp_path: Path) -> None:
    kill = callback("KillAt", hook="on_train_batch_start", call=6)
    found, turns = {}, {}
    for name, ranks in (("one", 1), ("two", 2), ("killed", 2)):
        command = Command(tied_model, tmp_path / name, ranks=ranks)
        args = [*options(tmp_path / name), f"--trainer.accumulate_grad_batches={4 // ranks}"]
        code, output = command.run(*args, callbacks=(kill,) if name == "killed" else ())
        if name == "killed":
            assert code == -signal.SIGKILL, output
            code, output = command.run(*args, "--ckpt_path=last")
        assert code == 0, output
        found[name] = command.last()
        values = metrics_of(tmp_path / name, version=int(name == "killed"))
        turns[name] = values["rollout/turns"][-1], values["rollout/reward"][-1]
    assert differing(found["killed"], found["two"]) == []
    weights = [found[name]["state_dict"] for name in ("one", "two")]
    assert gap(*weights) < 1e-5
    assert turns["one"] == pytest.approx(turns["two"])
    assert turns["killed"] == turns["two"]
    assert turns["one"][0] > 1.5
    assert 0 < turns["one"][1] < 1


def test_an_evaluation_keeps_episodes_with_their_rewards(tied_model: str, tmp_path: Path) -> None:
    overrides = [*tiny_overrides(tied_model, tmp_path), *options(tmp_path)]
    validate = ["validate", f"--config={ARITHMETIC}", *overrides]
    main(validate)
    before = metrics_of(tmp_path)
    (file,) = (tmp_path / "run" / "samples").glob("*/part-*.parquet")
    rows = read_table(file)
    assert len(rows) == 3 * 4
    assert {row["environment_reward"] for row in rows} == {0.0, 1.0}
    tools = [m for row in rows for m in json.loads(row["messages"]) if m["role"] == "tool"]
    assert {message["name"] for message in tools} == {"add"}
    assert any(not all(row["is_sampled"]) for row in rows)
    # An engine that fails would be noticed: nothing is sampled again.
    main([*validate, "--rollout.sampler.class_path=players.Player"])
    assert metrics_of(tmp_path, version=1) == before
    assert len(list((tmp_path / "run" / "samples").glob("*/part-*.parquet"))) == 1
    main([*validate, "--data.environments.max_turns=1"])
    assert len(list((tmp_path / "run" / "samples").glob("*/part-*.parquet"))) == 2


def test_episodes_are_sampled_ahead(tied_model: str, tmp_path: Path) -> None:
    fit(
        *tiny_overrides(tied_model, tmp_path),
        *options(tmp_path),
        "--rollout.sampler=players.PlayerAhead",
        "--rollout.overlap=true",
        "--trainer.max_epochs=3",
    )
    values = metrics_of(tmp_path)
    assert values["rollout/staleness"] == [0.0, 1.0, 1.0]
    assert min(values["rollout/turns"]) > 1.3


def test_tasks_of_reasoning_gym_get_tools(tied_model: str, tmp_path: Path) -> None:
    pytest.importorskip("reasoning_gym")
    source = {"class_path": "ReasoningGym", "init_args": {"tasks": {"chain_sum": {}}, "size": 20}}
    fit(
        *tiny_overrides(tied_model, tmp_path),
        *options(tmp_path, environments=None, tools=["prl_lightning.arithmetic.tools.calculate"]),
        f"--data.train={json.dumps(source)}",
        "--data.max_prompt_tokens=400",
        "--evaluation.sets={}",
        "--rollout.rewards=[prl_lightning.rewards.ReasoningGymReward]",
    )
    values = metrics_of(tmp_path)
    assert values["rollout/calls"][-1] > 0.3
    assert values["rollout/reward_failures/ReasoningGymReward"] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("changes", "override", "message"),
    [
        ({"turn_tokens": 50}, "", r"turn_tokens=50 is above rollout\.max_new_tokens=40"),
        ({}, "--rollout.limits.workers=0", r"rollout\.limits\.workers=0"),
        ({}, "--rollout.stop=[end]", r"rollout\.stop has the texts \['end'\]"),
        ({"environments": None, "tools": ["games.shout"]}, "", "has tools alone"),
        ({"environments": None}, "", "neither environments nor tools"),
        ({"max_turns": 0}, "", r"data\.environments\.max_turns=0: must be at least 1"),
        ({"format": None}, "", r"no calls of tools.*TextTools"),
        ({"environments": "pathlib.Path"}, "", r"Path has no method reset\(\*\*row\)"),
        ({"environments": {"a": "games.Sum", "b": "games.Hostile"}}, "", "'environment' is None"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_what_cannot_work_is_said_before_a_model_is_loaded(
    tied_model: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    override: str,
    message: str,
) -> None:
    arguments = [*tiny_overrides(tied_model, tmp_path), *options(tmp_path, **changes)]
    with pytest.raises((ValueError, SystemExit)) as raised:
        fit(*arguments, *([override] if override else []))
    assert re.search(message, f"{raised.value} {capsys.readouterr().err}")


def test_its_reward_needs_an_environment(tied_model: str, tmp_path: Path) -> None:
    reward = "--rollout.rewards=[prl_lightning.rewards.EnvironmentReward]"
    with pytest.raises(ValueError, match=r"EnvironmentReward, but there are no data\.environments"):
        fit(*tiny_overrides(tied_model, tmp_path), reward)
