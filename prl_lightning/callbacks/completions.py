"""CompletionLog: sampled completions, with where the credit goes, for people to read."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from torch import Tensor

from prl_lightning.callbacks.parts import (
    is_last_epoch,
    prl_module,
    prompt_data,
    run_folder,
    train_rollouts,
)
from prl_lightning.data import collate
from prl_lightning.data.loader import gather
from prl_lightning.tables import write_table
from prl_lightning.types import Message, Rollout

FOLDER = "completions"
# What a logger's table shows of a row; the file has the tokens too.
SHOWN = ("prompt", "completion", "reward", "outcome_advantage", "length")
PER_TOKEN = ("policy_logprobs", "ref_logprobs", "process_rewards", "advantages", "step_ends")


class CompletionLog(Callback):
    """Write some groups of an epoch to ``completions/epoch=*.parquet`` and into the loggers.

    The file is what ``prl report`` reads: each completion with its tokens' log-probabilities,
    process rewards and advantages. Weights & Biases and MLflow get a table, TensorBoard a text.
    ``prl predict`` writes the same for every prompt of the evaluation sets.

    Args:
        every_n_epochs: of training, the first one, every so many and the last; 0 for none.
        groups: how many groups of an epoch.

    Raises:
        ValueError: a number is negative, or no group is asked for.
    """

    def __init__(self, every_n_epochs: int = 10, groups: int = 4) -> None:
        if every_n_epochs < 0 or groups < 1:
            raise ValueError(
                f"CompletionLog(every_n_epochs={every_n_epochs}, groups={groups}): epochs must not "
                "be negative (0 for none), and groups be at least 1."
            )
        self.every_n_epochs = every_n_epochs
        self.groups = groups
        self._rows: list[dict[str, Any]] = []

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Before an epoch's first update, by the policy that it starts from."""
        if batch_idx or not self.every_n_epochs:
            return
        if trainer.current_epoch % self.every_n_epochs and not is_last_epoch(trainer):
            return
        module, size = prl_module(pl_module), prompt_data(trainer).group_size
        rollouts = train_rollouts(trainer).rollouts
        own = min(math.ceil(self.groups / trainer.world_size), len(rollouts) // size)
        for number in range(own):
            group = rollouts[number * size : (number + 1) * size]
            inspected = module.inspect(collate(group, 1, len(group)).to(module.device))
            self._note(trainer, group, inspected, number)
        self._write(trainer)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep one prompt's group."""
        if outputs is None:
            return
        buffers = list(prompt_data(trainer).eval_rollouts.values())
        number = batch_idx + sum(len(buffer) for buffer in buffers[:dataloader_idx])
        group = buffers[dataloader_idx].micro_batch_rollouts[batch_idx]
        self._note(trainer, group, outputs, number)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what was kept."""
        self._write(trainer)

    def _note(
        self,
        trainer: Trainer,
        group: Sequence[Rollout],
        inspected: dict[str, Tensor],
        number: int,
    ) -> None:
        """A row for each completion of this rank's ``number``-th group."""
        decode = prompt_data(trainer).tokenizer.decode
        values = {name: tensor.cpu() for name, tensor in inspected.items()}
        for place, rollout in enumerate(group):
            ids = rollout.completion.token_ids
            known = {name: rows[place, : len(ids)].tolist() for name, rows in values.items()}
            self._rows.append(
                {
                    "epoch": trainer.current_epoch,
                    "step": trainer.global_step,
                    "group": number * trainer.world_size + trainer.global_rank,
                    "prompt": prompt_text(rollout.prompt.source),
                    "completion": rollout.text,
                    "reward": rollout.reward,
                    "outcome_advantage": rollout.outcome_advantage.mean().item(),
                    "length": len(ids),
                    "finished": rollout.completion.finished,
                    "tokens": [decode([token]) for token in ids],
                }
                | {name: known.get(name) for name in PER_TOKEN}
            )

    def _write(self, trainer: Trainer) -> None:
        """All ranks' rows into one file and the loggers; a collective."""
        shares = gather(self._rows, trainer.global_rank, trainer.world_size)
        self._rows = []
        folder = run_folder(trainer)
        if shares is None or folder is None:
            return
        rows = sorted((row for share in shares for row in share), key=lambda row: row["group"])
        if rows:
            name = f"epoch={trainer.current_epoch:05d}"
            write_table(folder / FOLDER / f"{name}.parquet", rows)
            for logger in trainer.loggers:
                log_table(logger, name, rows, trainer.global_step)


def prompt_text(source: str | list[Message]) -> str:
    """A prompt as a text to read: of a chat, each message behind its role.

    Args:
        source: see Prompt.

    Example:
        >>> prompt_text([{"role": "user", "content": "1 + 1?"}])
        'user: 1 + 1?'
    """
    if isinstance(source, str):
        return source
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in source)


def log_table(logger: Logger, name: str, rows: Sequence[dict[str, Any]], step: int) -> None:
    """Hand completions to a logger that has tables or texts, and to no other.

    Args:
        logger: of the Trainer.
        name: of the table.
        rows: as CompletionLog makes them.
        step: of the Trainer.
    """
    cells = [[row[column] for column in SHOWN] for row in rows]
    if isinstance(logger, WandbLogger):
        logger.log_table(FOLDER, columns=list(SHOWN), data=cells, step=step)
    elif isinstance(logger, MLFlowLogger):
        columns = {column: [row[column] for row in rows] for column in SHOWN}
        logger.experiment.log_table(str(logger.run_id), columns, f"{FOLDER}/{name}.json")
    elif isinstance(logger, TensorBoardLogger):
        texts = [[_cell(value) for value in row] for row in cells]
        logger.experiment.add_text(FOLDER, markdown_table(SHOWN, texts), step)


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown.

    Args:
        columns: their names.
        rows: cells; what a model has written goes through ``code_span`` first.

    Example:
        >>> print(markdown_table(["set", "mean@8"], [["aime24", "0.25"]]))
        | set | mean@8 |
        | --- | --- |
        | aime24 | 0.25 |
    """
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def code_span(text: str) -> str:
    r"""A text in one line of code, where Markdown and HTML mean nothing.

    Args:
        text: by a model.

    Example:
        >>> code_span("a|b\n<c>")
        '`"a\\u007cb\\n<c>"`'
    """
    escaped = json.dumps(text, ensure_ascii=False)
    for mark in "|`":  # these would end the cell, or the code
        escaped = escaped.replace(mark, f"\\u{ord(mark):04x}")
    return f"`{escaped}`"


def _cell(value: Any) -> str:
    if isinstance(value, str):
        return code_span(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
