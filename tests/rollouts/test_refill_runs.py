"""Runs that refill groups without signal: on one and two ranks, after a kill, at the limit."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from interruptions import Command, callback, differing
from prl_lightning.callbacks import RolloutCallback
from prl_lightning.checks.contradictions import ConfigurationError
from prl_lightning.data import PromptDataModule
from prl_lightning.data.stream import DRAW, TRAIN, seed_of
from prl_lightning.models.loading import load_tokenizer
from prl_lightning.sampling import HFSampler
from prl_lightning.types import Rollout
from ranks import read, recorded_run, run_all
from recorded import _completion
from sample_rewards import even_digits
from tiny_runs import fit, tiny_overrides
from trained_prompts import lines_of
from trainer_runs import TRAIN_ALONE, train

pytestmark = pytest.mark.process

REFILL = [
    "--rollout.refill=3",
    "--data.group_size=2",
    "--data.updates_per_epoch=2",
    "--data.difficulty={passes: 1, keep: 0.1}",
    "--trainer.max_epochs=4",
]


def trained_prompts(file: Path) -> list[str]:
    return [
        "--trainer.callbacks+=trained_prompts.TrainedPrompts",
        f"--trainer.callbacks.file={file}",
    ]


def by_a_slow_loop(model: str, epochs: int) -> list[dict[str, Any]]:
    """Prompt after prompt, with the completions of RecordedSampler."""
    decode = load_tokenizer(model).batch_decode
    position, solved, lines = 0, [False] * 12, []
    for _ in range(epochs):
        kept: list[tuple[int, int]] = []
        spare: list[tuple[int, int]] = []
        now = solved.copy()
        while len(kept) < 4 and len(kept) + len(spare) < 3 * 4:
            order = torch.randperm(12, generator=torch.Generator().manual_seed(position // 12))
            row, here = int(order[position % 12]), position
            position += 1
            if solved[row] and seed_of(0, DRAW, here) >= 0.1 * 2**62:
                continue
            seed = seed_of(0, TRAIN, here)
            ids = [_completion(seed + sample, 8).token_ids for sample in range(2)]
            first, second = even_digits(decode(ids, skip_special_tokens=True))
            (spare if first == second else kept).append((here, seed))
            now[row] = first == second == 1.0
        solved = now
        seeds = [seed for _, seed in sorted(kept + spare[: 4 - len(kept)])]
        lines.append({"updates": [sorted(seeds[:2]), sorted(seeds[2:])], "position": position})
    return lines


def test_one_and_two_ranks_use_the_prompts_of_a_slow_loop(tied_model: str, tmp_path: Path) -> None:
    used = {}
    for ranks in (1, 2):
        name = f"{ranks}"
        arguments = [
            *recorded_run(tied_model, tmp_path / name),
            *REFILL,
            *trained_prompts(tmp_path / f"{name}.jsonl"),
            *TRAIN_ALONE,
            "--trainer.accelerator=cpu",
            f"--trainer.devices={ranks}",
        ]
        if ranks == 1:
            fit(*arguments)
        else:
            run_all(tmp_path, ranks, {name: arguments})
        record = read(tmp_path / name)
        used[ranks] = lines_of(tmp_path / f"{name}.jsonl")
        assert record["metrics"]["rollout/refill_unfilled"] == 0.0
        assert record["metrics"]["rollout/solved_prompts"] > 0.0
    expected = by_a_slow_loop(tied_model, 4)
    assert expected[-1]["position"] > 16  # prompts were refilled or passed over
    assert used[1] == expected
    assert used[2] == expected


def test_a_killed_run_refills_with_the_same_prompts(tied_model: str, tmp_path: Path) -> None:
    """Killed in the middle of an iteration whose prompts are not where the epoch would say."""
    kill = callback("KillAt", hook="on_train_batch_start", call=6)
    commands, used = {}, {}
    for name in ("alone", "killed"):
        commands[name] = Command(tied_model, tmp_path / name, ranks=2)
        record = callback("TrainedPrompts", file=str(tmp_path / f"{name}.jsonl"))
        record["class_path"] = "trained_prompts.TrainedPrompts"
        options = [*REFILL, "--rollout.rewards=[sample_rewards.even_digits]"]
        code, output = commands[name].run(
            *options, callbacks=(record, *((kill,) if name == "killed" else ()))
        )
        if name == "killed":
            assert code == -signal.SIGKILL, output
            code, output = commands[name].run(*options, "--ckpt_path=last", callbacks=(record,))
        assert code == 0, output
        used[name] = lines_of(tmp_path / f"{name}.jsonl")
    assert used["killed"] == used["alone"]
    assert used["alone"][0]["position"] > 4  # else the epoch's number would do
    killed, alone = (commands[name].last() for name in ("killed", "alone"))
    assert differing(killed, alone) == []
    counts = alone["PromptDataModule"]["solved"]
    assert torch.equal(killed["PromptDataModule"]["solved"], counts)
    assert 0 < counts.sum() < len(counts)


def never_differs(completions: list[str], **columns: Any) -> list[float]:
    return [0.0] * len(completions)


def test_an_iteration_where_nothing_has_a_signal_takes_the_first_prompts(
    tied_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    observed: list[Sequence[Rollout]] = []
    advance = PromptDataModule.advance

    def advance_and_keep(data: PromptDataModule, rollouts: Any, position: int) -> dict[str, float]:
        observed.append(rollouts)
        return advance(data, rollouts, position)

    monkeypatch.setattr(PromptDataModule, "advance", advance_and_keep)
    with pytest.warns(UserWarning, match=r"raise rollout\.refill=3.*100% of the places") as caught:
        module, watch = train(
            tied_model, tmp_path, rewards=[never_differs], rollout={"refill": 3}, epochs=2
        )
    assert sum("rollout.refill=3" in str(one.message) for one in caught) == 1
    data = module.trainer.datamodule
    assert data.prompts_seen == 2 * 12
    trained = [rollout.prompt.seed for rollout in data.train_buffer.rollouts]
    assert trained == [seed_of(0, TRAIN, position) for position in range(12, 16) for _ in range(4)]
    # A curriculum sees also the groups that are not trained on.
    seen = [rollout.prompt.seed for rollout in observed[1]]
    assert seen == [seed_of(0, TRAIN, position) for position in range(12, 24) for _ in range(4)]
    assert {name: watch.values[1][f"rollout/{name}"] for name in (
        "refill_attempts", "refill_discarded", "refill_unfilled", "groups_without_signal",
    )} == pytest.approx({
        "refill_attempts": 3.0, "refill_discarded": 2 / 3,
        "refill_unfilled": 1.0, "groups_without_signal": 1.0,
    })  # fmt: skip


def test_refill_and_overlap_exclude_each_other() -> None:
    with pytest.raises(ValueError, match=r"overlap=true and rollout\.refill=2"):
        RolloutCallback([even_digits], HFSampler(), overlap=True, refill=2)


def test_a_refill_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rollout\.refill=0: must be at least 1"):
        RolloutCallback([even_digits], HFSampler(), refill=0)


def test_groups_of_one_cannot_be_refilled(tied_model: str, tmp_path: Path) -> None:
    options = ["--data.group_size=1", "--rollout.refill=2", "--model.objective.outcome=reward"]
    with pytest.raises(ConfigurationError, match=r"data\.group_size=1, but rollout\.refill=2"):
        fit(*tiny_overrides(tied_model, tmp_path), *options)
