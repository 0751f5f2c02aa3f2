"""EvaluationLog: the results of evaluations, in files and on the screen."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from prl_lightning.callbacks.rollout import rollout_callback
from prl_lightning.distributed import gather
from prl_lightning.evaluation.results import Estimate, SetResults
from prl_lightning.module import PRLModule
from prl_lightning.rewards import MathReward
from prl_lightning.runs.files import EVALUATIONS
from prl_lightning.runs.tables import write_table
from prl_lightning.runs.text import markdown_table, prompt_text
from prl_lightning.trainer_access import prl_module, prompt_data, run_folder, weights_origin
from prl_lightning.types import Prompt


class EvaluationLog(Callback):
    """Append every evaluation to ``evaluations.jsonl`` in the run's folder.

    ``prl validate`` and ``prl test`` also write ``evaluation.json``, ``evaluation.md`` (the table
    that they print) and ``samples.parquet``, with one row per completion.
    """

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the results that the module has computed over all ranks."""
        module = prl_module(pl_module)
        folder, results = run_folder(trainer), module.eval_results
        if not results or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        is_alone = trainer.state.fn != TrainerFn.FITTING
        rows = list(_samples(trainer)) if is_alone else []
        shares = gather(rows) if is_alone else None
        if not trainer.is_global_zero:
            return
        folder.mkdir(parents=True, exist_ok=True)
        evaluation = {
            **weights_origin(trainer, module),
            "stage": "test" if trainer.testing else "val",
            **_conditions(trainer, module),
        }
        evaluation["sets"] = {name: asdict(some) for name, some in results.items()}
        with (folder / EVALUATIONS).open("a") as lines:
            lines.write(json.dumps(evaluation) + "\n")
        if shares is not None:
            rows = [row for share in shares for row in share]
            order = list(results)
            rows.sort(key=lambda row: (order.index(row["set"]), row["problem"], row["sample"]))
            write_table(folder / "samples.parquet", rows)
            caution = prompt_data(trainer).evaluation.caution
            self._show(folder, evaluation, results, caution)

    on_test_end = on_validation_end

    def _show(
        self,
        folder: Path,
        evaluation: dict[str, Any],
        results: dict[str, SetResults],
        caution: str,
    ) -> None:
        below = caution and f"\n\n{caution}"
        table = results_table(results) + below
        fitting = results_table(results, shutil.get_terminal_size().columns) + below
        (folder / "evaluation.json").write_text(json.dumps(evaluation, indent=2) + "\n")
        (folder / "evaluation.md").write_text(table + "\n")
        print(
            f"\n{fitting}\n\nMeans over problems with 95% bootstrap intervals. All files: {folder}"
        )


def _conditions(trainer: Trainer, module: PRLModule) -> dict[str, Any]:
    """Return what was evaluated and how: results under other conditions are not comparable."""
    rollout, settings = rollout_callback(trainer).settings, prompt_data(trainer).evaluation
    checkpoint = None if trainer.state.fn == TrainerFn.FITTING else trainer.ckpt_path
    if checkpoint is not None and "://" not in str(checkpoint):
        checkpoint = Path(checkpoint).resolve()
    return {
        "policy": module.policy_name,
        "checkpoint": None if checkpoint is None else str(checkpoint),
        "sampling": {
            "n": settings.samples,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "max_new_tokens": rollout.max_new_tokens,
            **({"stop": rollout.stop} if rollout.stop else {}),
        },
        "rewards": list(rollout.rewards.names),
        "solved_at": settings.solved_at,
    }


def results_table(results: dict[str, SetResults], width: int | None = None) -> str:
    """Format results as a Markdown table with one row per set.

    Args:
        results: by the name of the set.
        width: in characters. The columns that do not fit go to further tables below, because a
            terminal would break lines within cells.
    """
    names = list(dict.fromkeys(name for some in results.values() for name in some.metrics))
    rows = [
        [name, str(some.problems), *(_interval(some.metrics.get(metric)) for metric in names)]
        for name, some in results.items()
    ]
    lines = [["set", "problems", *names], *rows]
    sizes = [max(len(line[column]) for line in lines) + 3 for column in range(len(lines[0]))]
    parts: list[list[int]] = [[0]]
    for column in range(1, len(sizes)):
        taken = 1 + sum(sizes[place] for place in [*parts[-1], column])
        if width is not None and taken > width and len(parts[-1]) > 1:
            parts.append([0])
        parts[-1].append(column)
    tables = ([[line[place] for place in part] for line in lines] for part in parts)
    return "\n\n".join(markdown_table(table[0], table[1:]) for table in tables)


def _interval(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    digits = 1 if estimate.mean > 1 else 3  # lengths have one, shares three
    mean, low, high = (f"{value:.{digits}f}" for value in estimate)
    return f"{mean} [{low}, {high}]"


def _samples(trainer: Trainer) -> Iterator[dict[str, Any]]:
    """Yield a row for each completion of this rank."""
    for name, buffer in prompt_data(trainer).eval_buffers.items():
        for number, group in enumerate(buffer.micro_batch_rollouts):
            for sample, rollout in enumerate(group):
                if rollout.prompt.is_padding:
                    continue
                yield {
                    "set": name,
                    "problem": number * trainer.world_size + trainer.global_rank,
                    "sample": sample,
                    "prompt": prompt_text(rollout.prompt.source),
                    "reference_answer": _reference(rollout.prompt),
                    "completion": rollout.text,
                    "token_ids": rollout.completion.token_ids,
                    "reward": rollout.reward,
                    "answer_group": rollout.answer,
                    "length": rollout.completion.length,
                    "finished": rollout.completion.finished,
                }


def _reference(prompt: Prompt) -> str | None:
    """Return the column that MathReward compares with, as text: types differ between sets."""
    given = (prompt.columns.get(name) for name in MathReward.columns[0])
    answer = next((value for value in given if value is not None), None)
    return None if answer is None else str(answer)
