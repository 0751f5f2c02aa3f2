"""EvaluationLog: what an evaluation has found, in files and on the screen."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from prl_lightning.callbacks.completions import markdown_table, prompt_text
from prl_lightning.callbacks.parts import prl_module, prompt_data, run_folder
from prl_lightning.data.loader import gather
from prl_lightning.evaluation import Estimate, SetResults
from prl_lightning.tables import write_table

EVALUATIONS = "evaluations.jsonl"


class EvaluationLog(Callback):
    """Add every evaluation to ``evaluations.jsonl`` of the run's folder.

    ``prl validate`` and ``prl test`` also write ``evaluation.json``, ``evaluation.md`` (the table
    that they print) and ``samples.parquet``, a row for each completion.
    """

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the results, which the module has computed over all ranks."""
        self._write(trainer, prl_module(pl_module).eval_results, "val")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the results, which the module has computed over all ranks."""
        self._write(trainer, prl_module(pl_module).eval_results, "test")

    def _write(self, trainer: Trainer, results: dict[str, SetResults], stage: str) -> None:
        folder = run_folder(trainer)
        if folder is None or not results:
            return
        is_alone = trainer.state.fn != TrainerFn.FITTING
        rows = list(_samples(trainer)) if is_alone else []
        shares = gather(rows, trainer.global_rank, trainer.world_size) if is_alone else None
        if not trainer.is_global_zero:
            return
        folder.mkdir(parents=True, exist_ok=True)
        epoch = 0 if trainer.sanity_checking else trainer.current_epoch
        found = {"step": trainer.global_step, "epoch": epoch, "stage": stage}
        found |= {"sets": {name: asdict(some) for name, some in results.items()}}
        with (folder / EVALUATIONS).open("a") as lines:
            lines.write(json.dumps(found) + "\n")
        if shares is not None:
            write_table(folder / "samples.parquet", [row for share in shares for row in share])
            self._show(folder, found, results)

    def _show(self, folder: Path, found: dict[str, Any], results: dict[str, SetResults]) -> None:
        table = results_table(results)
        (folder / "evaluation.json").write_text(json.dumps(found, indent=2) + "\n")
        (folder / "evaluation.md").write_text(table + "\n")
        print(f"\n{table}\n\nMeans over problems with 95% bootstrap intervals. All of it: {folder}")


def results_table(results: dict[str, SetResults]) -> str:
    """A Markdown table, one row a set.

    Args:
        results: of each set by name.
    """
    names = list(dict.fromkeys(name for some in results.values() for name in some.metrics))
    rows = [
        [name, str(some.problems), *(_interval(some.metrics.get(metric)) for metric in names)]
        for name, some in results.items()
    ]
    return markdown_table(["set", "problems", *names], rows)


def _interval(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    digits = 1 if estimate.mean > 1 else 3  # a length, or a share
    mean, low, high = (f"{value:.{digits}f}" for value in estimate)
    return f"{mean} [{low}, {high}]"


def _samples(trainer: Trainer) -> Iterator[dict[str, Any]]:
    """A row for each completion of this rank."""
    for name, buffer in prompt_data(trainer).eval_rollouts.items():
        for number, group in enumerate(buffer.micro_batch_rollouts):
            for sample, rollout in enumerate(group):
                if rollout.prompt.is_padding:
                    continue
                yield {
                    "set": name,
                    "problem": number * trainer.world_size + trainer.global_rank,
                    "sample": sample,
                    "prompt": prompt_text(rollout.prompt.source),
                    "completion": rollout.text,
                    "reward": rollout.reward,
                    "answer": rollout.answer,
                    "length": len(rollout.completion.token_ids),
                    "finished": rollout.completion.finished,
                }
