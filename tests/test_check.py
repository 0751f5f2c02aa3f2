"""Contradictions before anything is loaded, all at once, and what a run asks for."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from prl_lightning.check import Refused
from prl_lightning.cli import main
from runs import QUICKSTART, fit, tiny_overrides


@pytest.fixture
def bare_model(tied_model: str, tmp_path: Path) -> str:
    """A model's folder without its weights: whoever loads them fails."""
    folder = tmp_path / "bare"
    shutil.copytree(tied_model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return str(folder)


def test_contradictions_are_named_all_at_once(bare_model: str, tmp_path: Path) -> None:
    overrides = [
        *tiny_overrides(bare_model, tmp_path),
        "--model.pass_at=[2, 64]",
        "--trainer.accumulate_grad_batches=3",
        "--rollout.max_new_tokens=100000",
        "--data.train=nowhere.jsonl",
        "--model.objective.steps=0",
        "--model.objective.importance_cap=2",
        "--rollout.overlap=true",
        "--rollout.sampler=ProcessSampler",
        "--rollout.sampler.sampler=HFSampler",
    ]
    with pytest.raises(ValueError, match="cannot be done") as raised:
        fit(*overrides)
    first, *found = str(raised.value).split("\n- ")
    assert len(found) == 6
    for words in (
        r"model.pass_at has \[64\], but data.eval_group_size=4",
        r"\(16\) is not a multiple of trainer.accumulate_grad_batches \(3\)",
        "max_new_tokens=100000 = 100016 tokens, but the model takes",
        "no file 'nowhere.jsonl'",
        "model.objective.steps=0",
        "importance_cap=2.0 has no effect with rollout.overlap=true",
    ):
        assert any(re.search(words, message) for message in found), words
    assert not (tmp_path / "run").exists()


def test_check_takes_what_fit_takes_and_what_it_has_written(
    tied_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(*tiny_overrides(tied_model, tmp_path))
    written = tmp_path / "run" / "version_0" / "config.yaml"
    main(["check", "--config", str(written), "--ckpt_path=last"])
    assert "4 prompts x 4 completions" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--model.policy=no/such/folder/as.this", r"policy='no/such/folder/as\.this' cannot"),
        ("--data.group_size=1", r"data\.group_size=1, but .*outcome='grpo' compares"),
        ("--data.train=heldout.jsonl:test", r"heldout\.jsonl:test names a split, but a file has"),
    ],
)
def test_a_contradiction_is_named(
    change: str, message: str, tied_model: str, tmp_path: Path
) -> None:
    with pytest.raises(Refused, match=message):
        main(["check", "--config", str(QUICKSTART), *tiny_overrides(tied_model, tmp_path), change])


def test_an_evaluation_is_not_bothered_by_what_only_training_needs(
    tied_model: str, tmp_path: Path
) -> None:
    overrides = [*tiny_overrides(tied_model, tmp_path), "--trainer.accumulate_grad_batches=3"]
    main(["validate", "--config", str(QUICKSTART), *overrides, "--data.train=nowhere.jsonl"])
    assert (tmp_path / "run" / "version_0" / "evaluation.json").exists()


def test_check_says_what_a_run_asks_for_without_loading_weights(
    bare_model: str, tied_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [
        *tiny_overrides(bare_model, tmp_path),
        "--model.objective.beta=0.1",
        "--trainer.devices=2",
        "--trainer.strategy=ddp",
        "--trainer.max_epochs=7",
    ]
    main(["check", "--config", str(QUICKSTART), *overrides])
    said = capsys.readouterr().out
    assert "4 prompts x 4 completions = 16 an epoch; / 1 updates = 16 an update; / 2 ranks" in said
    assert "at most 16 x (16 + 8) = 384 an epoch" in said
    assert "7 epochs x 1 = 7 updates" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "copies"),
    [
        # Policy, gradient, two moments of Adam, reference.
        (["--model.objective.beta=0.1"], [1, 1, 2, 1]),
        (["--model.objective.beta=0"], [1, 1, 2]),
        (["--model.objective.beta=0", "--trainer.precision=bf16-true"], [0.5, 0.5, 1]),
        (["--model.objective.beta=0.1", "--trainer.strategy=fsdp2", "--trainer.devices=4"],
         [0.25, 0.25, 0.5, 0.25]),
        (["--model.objective.beta=0", "--model.optimizer={class_path: torch.optim.SGD, "
          "init_args: {lr: 0.1, momentum: 0.9}}"], [1, 1, 1]),
        (["--model.objective.beta=0.1", "--model.lora={r: 2}"], [1]),
    ],
)  # fmt: skip
def test_the_memory_estimate_counts_every_copy_of_the_weights(
    changes: list[str], copies: list[float], tied_model: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("prl_lightning.check.MIB", 1)  # in bytes, to be exact
    main(["check", "--config", str(QUICKSTART), *tiny_overrides(tied_model, tmp_path), *changes])
    lines = re.findall(r"^  \w.*? ([\d,]+) MiB$", capsys.readouterr().out, flags=re.MULTILINE)
    model = AutoModelForCausalLM.from_pretrained(tied_model)
    size = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert [int(line.replace(",", "")) for line in lines] == [round(size * n) for n in copies]
