"""References by name in whole runs: scored, logged, resumed, and equal on any number of ranks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from conftest import MakeRollout
from prl_lightning.cli import main
from prl_lightning.data import collate
from prl_lightning.models.references import References
from prl_lightning.models.vocabulary import check_vocabulary
from prl_lightning.references import Reference
from ranks import gap, read, recorded_run, run_all
from tiny_runs import ARITHMETIC, fit, metrics_of, tiny_overrides

pytestmark = pytest.mark.process


def references(**named: dict[str, Any]) -> str:
    return f"--model.objective.references={json.dumps(named)}"


def other_model(model: str, folder: Path) -> str:
    """The same architecture and vocabulary with other weights."""
    other = AutoModelForCausalLM.from_pretrained(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    other.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return str(folder)


def recorded(model: str, folder: Path, *more: str) -> list[str]:
    return [
        *(word for word in recorded_run(model, folder) if "objective.beta" not in word),
        "--trainer.accelerator=cpu",
        *more,
    ]


def test_one_reference_by_name_is_the_short_form(tied_model: str, tmp_path: Path) -> None:
    short, named = tmp_path / "short", tmp_path / "named"
    fit(*recorded(tied_model, short, "--model.objective.beta=0.5"))
    fit(*recorded(tied_model, named, references(start={"beta": 0.5})))
    one, other = read(short), read(named)
    assert gap(one["after"], other["after"]) == 0
    assert gap(one["after"], one["before"]) > 1e-3


def test_references_act_and_are_logged_by_name(tied_model: str, tmp_path: Path) -> None:
    """Adam moves every weight, so runs of one update differ in their gradient alone."""
    teacher = other_model(tied_model, tmp_path / "teacher")
    runs = {
        "start": references(start={"beta": 0.5}),
        "both": references(start={"beta": 0.5}, teacher={"model": teacher, "beta": 0.2}),
        "uniform": references(even={"kind": "uniform", "beta": 0.5}),
        "centred": references(start={"beta": 0.5, "centre": "group"}),
    }
    for name, setting in runs.items():
        fit(*recorded(tied_model, tmp_path / name, setting))
    records = {name: read(tmp_path / name) for name in runs}
    for name in ("both", "uniform", "centred"):
        assert gap(records[name]["after"], records["start"]["after"]) > 1e-5, name
    logged = metrics_of(tmp_path / "both")
    assert logged["train/kl_ref"] == logged["train/kl_ref/start"]
    assert logged["train/kl_ref"][0] == pytest.approx(0, abs=1e-6)
    assert abs(logged["train/kl_ref/teacher"][0]) > 0.01


def test_every_token_is_equally_likely_to_the_uniform_reference(
    tied_model: str, make_rollout: MakeRollout
) -> None:
    even = References({"even": Reference(kind="uniform")}, tied_model, lora=False)
    even.load(None, compile=False)
    assert not even.models
    scores = even.score(collate([make_rollout([3], [4, 5]), make_rollout([3], [6])], 1, 1), even)
    size = AutoModelForCausalLM.from_pretrained(tied_model).config.vocab_size
    assert scores.shape == (2, 2, 1)
    assert torch.equal(scores, torch.full((2, 2, 1), -math.log(size)))


def test_ranks_and_micro_batches_change_nothing(tied_model: str, tmp_path: Path) -> None:
    teacher = other_model(tied_model, tmp_path / "teacher")
    setting = references(
        start={"beta": 0.3, "centre": "batch", "discount": 0.9, "target": 0.01},
        teacher={"model": teacher, "beta": 0.2, "shape": "shuffled"},
        before={"kind": "moving", "every": 2, "beta": 0.4},
    )
    fit(*recorded(tied_model, tmp_path / "one", setting))
    ranks = ["--trainer.strategy=fsdp2", "--trainer.devices=2"]
    two = run_all(tmp_path, 2, {"two": [*recorded(tied_model, tmp_path / "two", setting), *ranks]})
    one = read(tmp_path / "one")
    assert gap(two["two"]["after"], one["after"]) < 1e-5
    assert gap(one["after"], one["before"]) > 1e-3
    for logged in (metrics_of(tmp_path / name) for name in ("one", "two")):
        # PPO's rule, from the KL that is logged.
        want = [0.3]
        for kl in logged["train/kl_ref/start"][:-1]:
            want.append(want[-1] * (2 if kl > 0.015 else 0.5 if kl < 0.01 / 1.5 else 1))
        assert logged["train/beta/start"] == pytest.approx([min(beta, 1) for beta in want])
        assert len(set(want)) == 3
        assert "train/beta/teacher" not in logged


@pytest.mark.parametrize("epochs", [2, 3])
def test_a_moving_reference_is_resumed(epochs: int, tied_model: str, tmp_path: Path) -> None:
    """It became the policy after the second of four iterations, before or at the checkpoint."""
    setting = references(before={"kind": "moving", "every": 2, "beta": 0.5})
    rate = "--model.optimizer.init_args.lr=0.01"
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    fit(*tiny_overrides(tied_model, whole), setting, rate, "--trainer.max_epochs=4")
    command = [*tiny_overrides(tied_model, parts), setting, rate]
    fit(*command, f"--trainer.max_epochs={epochs}")
    fit(*command, "--trainer.max_epochs=4", "--ckpt_path=last")
    kl = metrics_of(whole)["train/kl_ref"]
    assert kl == metrics_of(parts, version=1)["train/kl_ref"]
    # Zero where the reference is the policy itself: at first, and after it has moved.
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert kl[2] == pytest.approx(0, abs=1e-6)
    assert min(abs(kl[1]), abs(kl[3])) > 1e-5


def test_models_with_the_same_weights_are_loaded_once(tied_model: str) -> None:
    settings = {
        "start": Reference(),
        "again": Reference(model=tied_model, beta=0.1),
        "even": Reference(kind="uniform"),
        "before": Reference(kind="moving"),
    }
    assert list(References(settings, tied_model, lora=False).sources().values()) == [tied_model] * 2
    assert References({"start": Reference()}, tied_model, lora=True).sources() == {}


def test_a_teacher_of_another_vocabulary_is_refused(tied_model: str, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tied_model)
    size = len(tokenizer)
    tokenizer.add_tokens(["<another>"])
    tokenizer.save_pretrained(tmp_path)
    AutoConfig.from_pretrained(tied_model).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{size + 1} tokens .*, the policy {size} tokens"):
        check_vocabulary(tied_model, str(tmp_path))
    words = ["check", f"--config={ARITHMETIC}", *tiny_overrides(tied_model, tmp_path)]
    with pytest.raises(ValueError, match="<another>"):
        main([*words, references(teacher={"model": str(tmp_path)})])
    with pytest.raises(OSError, match=r"missing' cannot be read"):
        check_vocabulary(tied_model, str(tmp_path / "missing"))
    check_vocabulary(tied_model, tied_model)


def test_distillation_needs_no_rewards(tied_model: str, tmp_path: Path) -> None:
    """One completion a prompt, and training prompts without an answer."""
    teacher = other_model(tied_model, tmp_path / "teacher")
    words = tiny_overrides(tied_model, tmp_path)
    rows = [json.dumps({"prompt": f"{n}+1?"}) for n in range(4)]
    (tmp_path / "bare.jsonl").write_text("\n".join(rows) + "\n")
    fit(
        *words,
        "--model.objective.outcome=none",
        references(teacher={"model": teacher, "beta": 1.0}),
        f"--data.train={tmp_path / 'bare.jsonl'}",
        "--data.group_size=1",
        "--rollout.rewards=[prl_lightning.rewards.MathReward]",
        "--model.optimizer.init_args.lr=0.003",
        "--trainer.max_epochs=6",
    )
    metrics = metrics_of(tmp_path)
    assert not any("reward" in name for name in metrics if name.startswith("rollout/"))
    assert metrics["train/kl_ref"][0] > 0
    assert metrics["train/kl_ref"][-1] < 0.8 * metrics["train/kl_ref"][0]
    assert "val/tiny/mean@4" in metrics


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([references(a={"beta": -1})], r"references\.a\.beta=-1"),
        ([references(a={"discount": 2})], r"references\.a\.discount=2"),
        ([references(a={"shape": "round"})], r"references\.a\.shape='round'"),
        ([references(a={"divergence": "no"})], r"references\.a\.divergence='no'"),
        ([references(a={"kind": "moving", "every": 0})], r"references\.a\.every=0"),
        ([references(a={"kind": "uniform", "model": "x"})], r"references\.a\.model='x'"),
        ([references(a={}), "--model.objective.beta=0.5"], r"references=\['a'\].*beta"),
        ([references(a={}), "--model.objective.kl=loss"], r"references=\['a'\].*kl='loss'"),
        ([references(a={}), "--model.track_reference=true"], "track_reference"),
        ([references(a={}), "--model.objective.outcome=none", "--rollout.refill=2"], "refill=2"),
        ([references(a={"kind": "moving", "target": 0.1})], r"a\.target=0\.1 .*kind='moving'"),
        (
            [references(a={"kind": "moving"}), "--model.lora={r: 4}"],
            r"a\.kind='moving'",
        ),
    ],
)
def test_a_reference_that_cannot_work_is_named(
    words: list[str], message: str, tied_model: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        main(["check", f"--config={ARITHMETIC}", *tiny_overrides(tied_model, tmp_path), *words])
