"""Run the command line on a tiny model, and read what it leaves behind."""

from __future__ import annotations

import json
import re
from pathlib import Path

from prl_lightning.arithmetic import draw_problems
from prl_lightning.cli import main
from prl_lightning.runs.files import read_metrics

ARITHMETIC = Path(__file__).parents[2] / "configs" / "arithmetic.yaml"


def write_prompts(file: Path, count: int = 12, seed: int = 0) -> Path:
    problems = draw_problems(1, 3, seed)
    rows = [next(problems) for _ in range(count)]
    file.write_text(
        "".join(json.dumps({"prompt": p.prompt, "answer": p.answer}) + "\n" for p in rows)
    )
    return file


def tiny_overrides(model: str, folder: Path, sampler: str = "HFSampler") -> list[str]:
    """Everything that makes configs/arithmetic.yaml a run of seconds."""
    train = write_prompts(folder / "train.jsonl")
    heldout = write_prompts(folder / "heldout.jsonl", count=5, seed=1)
    return [
        f"--model.policy={model}",
        "--evaluation.pass_at=[2]",
        "--data.prepare=null",
        f"--data.train={train}",
        f"--evaluation.sets={{tiny: {heldout}}}",
        "--data.prompts_per_epoch=4",
        "--data.group_size=4",
        "--evaluation.samples=4",
        "--data.max_prompt_tokens=16",
        "--rollout.rewards=[sample_rewards.even_digits]",
        f"--rollout.sampler={sampler}",
        "--rollout.max_new_tokens=8",
        f"--trainer.default_root_dir={folder / 'run'}",
        "--trainer.max_epochs=2",
        "--trainer.accumulate_grad_batches=2",
        "--trainer.check_val_every_n_epoch=1",
        "--trainer.enable_progress_bar=false",
    ]


def fit(*args: str, config: Path | str = ARITHMETIC) -> None:
    main(["fit", "--config", str(config), *args])


def metrics_of(folder: Path, version: int = 0) -> dict[str, list[float]]:
    curves = read_metrics(folder / "run" / f"version_{version}" / "metrics.csv")
    return {name: values for name, (_, values) in curves.items()}


def summary_line(metric: str, values: list[float]) -> str:
    """A pattern for what a run's last lines say of a metric."""
    return rf"{metric}: {values[0]:.2f} \[.*?\] -> {values[-1]:.2f} \["


def memory_of(said: str) -> dict[str, int]:
    """The MiB of each line of `prl check`'s estimate, by its name."""
    lines = re.findall(r"^  (\w[\w ]*?) +([\d,]+) MiB", said, flags=re.MULTILINE)
    return {name: int(value.replace(",", "")) for name, value in lines}
