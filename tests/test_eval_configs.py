"""configs/eval: the papers' sets are read whole, and a folder and a checkpoint are one model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from prl_lightning.cli import main
from prl_lightning.runs.tables import read_table
from tiny_runs import fit, tiny_overrides

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[1]
MATH = ROOT / "configs" / "eval" / "math.yaml"
COPIES = ROOT.parent / "shared" / "data" / "eval"
PROBLEMS = {
    "math500": 500,
    "minerva_math": 272,
    "olympiad_bench": 675,
    "aime24": 30,
    "amc23": 40,
}
SMALL = [
    "--evaluation.samples=2",
    "--evaluation.pass_at=[2]",
    "--rollout.sampler=HFSampler",
    "--trainer.precision=32-true",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
]


def evaluate(folder: Path, *args: str) -> dict[str, Any]:
    main(["validate", "--config", str(MATH), f"--trainer.default_root_dir={folder}", *args])
    found: dict[str, Any] = json.loads((folder / "version_0" / "evaluation.json").read_text())
    return found["sets"]


def test_files_have_the_sets_of_the_hub() -> None:
    local = yaml.safe_load((MATH.parent / "math-local.yaml").read_text())["evaluation"]["sets"]
    assert list(local) == list(yaml.safe_load(MATH.read_text())["evaluation"]["sets"])


@pytest.mark.example
@pytest.mark.skipif(not COPIES.is_dir(), reason="needs copies of the sets beside the repository")
def test_every_problem_of_the_papers_sets_is_asked(tied_model: str, tmp_path: Path) -> None:
    sets = {name: str(COPIES / f"{name}.jsonl") for name in PROBLEMS}
    found = evaluate(
        tmp_path,
        *SMALL,
        f"--model.policy={tied_model}",
        f"--evaluation.sets={json.dumps(sets)}",
        "--data.max_prompt_tokens=2040",
        "--rollout.max_new_tokens=2",
    )
    assert {name: results["problems"] for name, results in found.items()} == PROBLEMS
    assert len(read_table(tmp_path / "version_0" / "samples.parquet")) == 2 * sum(PROBLEMS.values())


def test_a_checkpoint_and_its_exported_folder_give_the_same_figures(
    tied_model: str, tmp_path: Path
) -> None:
    fit(*tiny_overrides(tied_model, tmp_path), "--model.optimizer.init_args.lr=1e-2")
    checkpoint = tmp_path / "run" / "version_0" / "checkpoints" / "last.ckpt"
    main(["export", f"--ckpt_path={checkpoint}", f"--out={tmp_path / 'exported'}"])
    ask = [
        *SMALL,
        f"--evaluation.sets={{tiny: {tmp_path / 'heldout.jsonl'}}}",
        "--data.format.columns={}",
        "--data.max_prompt_tokens=512",
        "--rollout.max_new_tokens=8",
        "--rollout.rewards=[sample_rewards.even_digits]",
    ]
    folder = evaluate(tmp_path / "a", *ask, f"--model.policy={tmp_path / 'exported'}")
    restored = evaluate(
        tmp_path / "b", *ask, f"--model.policy={tied_model}", f"--ckpt_path={checkpoint}"
    )
    base = evaluate(tmp_path / "c", *ask, f"--model.policy={tied_model}")
    assert folder == restored
    assert folder != base
