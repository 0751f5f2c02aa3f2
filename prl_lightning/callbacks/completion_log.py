"""CompletionLog: sampled completions, with where the credit goes, for people to read."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from torch import Tensor

from prl_lightning.data import collate
from prl_lightning.data.loader import gather
from prl_lightning.runs.files import COMPLETIONS
from prl_lightning.runs.tables import write_table
from prl_lightning.trainer_access import (
    is_last_epoch,
    prl_module,
    prompt_data,
    run_folder,
    train_rollouts,
    weights_are_of,
)
from prl_lightning.types import Message, Rollout

# What a logger's table shows of a row; the file has the tokens too.
SHOWN = ("prompt", "completion", "reward", "outcome_advantage", "length")
PER_TOKEN = (
    "policy_logprobs",
    "ref_logprobs",
    "process_rewards",
    "advantages",
    "outcome_advantages",
    "step_ends",
)


class CompletionLog(Callback):
    """Write an epoch to ``completions/epoch=*.parquet``, and some groups of it into the loggers.

    The file is what ``prl report`` reads. It has a row a completion, with its reward, advantage and
    length; those of some groups also have text, tokens, and the tokens' log-probabilities, process
    rewards and advantages. Weights & Biases and MLflow get a table of these, TensorBoard a text.
    ``prl predict`` writes the same of every prompt of the evaluation sets, ``set`` their name.

    Args:
        every_n_epochs: of training, the first one, every so many and the last; 0 for none.
        groups: how many groups of an epoch with their tokens.

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
        kept = math.ceil(self.groups / trainer.world_size)
        for number in range(len(rollouts) // size):
            group = rollouts[number * size : (number + 1) * size]
            inspected = None
            if number < kept:
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
        names, buffers = zip(*prompt_data(trainer).eval_rollouts.items(), strict=True)
        number = batch_idx + sum(len(buffer) for buffer in buffers[:dataloader_idx])
        group = buffers[dataloader_idx].micro_batch_rollouts[batch_idx]
        self._note(trainer, group, outputs, number, names[dataloader_idx])

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what was kept."""
        self._write(trainer)

    def _note(
        self,
        trainer: Trainer,
        group: Sequence[Rollout],
        inspected: dict[str, Tensor] | None,
        number: int,
        name: str = "train",
    ) -> None:
        """A row for each completion of this rank's ``number``-th group."""
        at = weights_are_of(trainer, trainer.lightning_module)
        for place, rollout in enumerate(group):
            row: dict[str, Any] = {
                "set": name,
                **at,
                "group": number * trainer.world_size + trainer.global_rank,
                "reward": rollout.reward,
                "outcome_advantage": rollout.outcome_advantage.mean().item(),
                "length": len(rollout.completion.token_ids),
                "finished": rollout.completion.finished,
                "prompt": None,
                "completion": None,
                "tokens": None,
                **dict.fromkeys(PER_TOKEN),
            }
            if inspected is not None:
                row |= self._tokens(trainer, rollout, inspected, place)
            self._rows.append(row)

    def _tokens(
        self, trainer: Trainer, rollout: Rollout, inspected: dict[str, Tensor], place: int
    ) -> dict[str, Any]:
        """Text, tokens and what each of them was given, of one row of ``inspected``."""
        decode = prompt_data(trainer).tokenizer.decode
        ids = rollout.completion.token_ids
        known = {name: values[place, : len(ids)].tolist() for name, values in inspected.items()}
        if rollout.outcome_advantage.ndim:  # else it is the same for all tokens
            known["outcome_advantages"] = rollout.outcome_advantage.tolist()
        return known | {
            "prompt": prompt_text(rollout.prompt.source),
            "completion": rollout.text,
            "tokens": [decode([token]) for token in ids],
        }

    def _write(self, trainer: Trainer) -> None:
        """All ranks' rows into one file and the loggers; a collective."""
        shares = gather(self._rows, trainer.global_rank, trainer.world_size)
        self._rows = []
        folder = run_folder(trainer)
        if shares is None or folder is None:
            return
        rows = sorted((row for share in shares for row in share), key=lambda row: row["group"])
        if rows:
            name = f"epoch={rows[0]['epoch']:05d}"
            write_table(folder / COMPLETIONS / f"{name}.parquet", rows)
            shown = [row for row in rows if row["tokens"] is not None]
            for logger in trainer.loggers:
                log_table(logger, name, shown, rows[0]["step"])


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
        logger.log_table(COMPLETIONS, columns=list(SHOWN), data=cells, step=step)
    elif isinstance(logger, MLFlowLogger):
        columns = {column: [row[column] for row in rows] for column in SHOWN}
        logger.experiment.log_table(str(logger.run_id), columns, f"{COMPLETIONS}/{name}.json")
    elif isinstance(logger, TensorBoardLogger):
        texts = [[_cell(value) for value in row] for row in cells]
        logger.experiment.add_text(COMPLETIONS, markdown_table(SHOWN, texts), step)


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
