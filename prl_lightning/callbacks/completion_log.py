"""CompletionLog: sampled completions and the credit of each token, for people to read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from prl_lightning.data import collate
from prl_lightning.distributed import gather
from prl_lightning.runs.files import COMPLETIONS
from prl_lightning.runs.tables import write_table
from prl_lightning.runs.text import code_span, markdown_table, prompt_text
from prl_lightning.trainer_access import (
    is_last_epoch,
    prl_module,
    prompt_data,
    run_folder,
    weights_origin,
)
from prl_lightning.types import Rollout

# The columns of a logger's table; the file also has the tokens.
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
    """Write an epoch to ``completions/epoch=*.parquet``, and some of its groups to the loggers.

    ``prl report`` reads the file. It has one row per completion with its reward, advantage and
    length. The rows of some groups also have the text and, for each token, log-probabilities,
    process reward and advantage. Weights & Biases and MLflow get a table of them, TensorBoard a
    text. ``prl predict`` writes the same for every prompt of the evaluation sets, with the name of
    the set in the column ``set``.

    Args:
        every_n_epochs: write the first epoch, every n-th and the last; 0 writes none.
        groups: number of groups per epoch that are written with their tokens.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(self, every_n_epochs: int = 10, groups: int = 4) -> None:
        if every_n_epochs < 0 or groups < 1:
            raise ValueError(
                f"completions.every_n_epochs={every_n_epochs}, completions.groups={groups}: "
                "every_n_epochs must be at least 0 (for none), and groups at least 1."
            )
        self.every_n_epochs = every_n_epochs
        self.groups = groups
        self._rows: list[dict[str, Any]] = []
        self._unwritten: dict[str, int] | None = None  # step and epoch of the current rollouts

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Write the epoch before its first update, with the current policy's log-probabilities."""
        if batch_idx or not self.every_n_epochs:
            return
        self._unwritten = weights_origin(trainer, pl_module)
        if trainer.current_epoch % self.every_n_epochs == 0 or is_last_epoch(trainer):
            self._write_epoch(trainer, is_updated=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the last epoch of a run that ended early, such as at ``max_time``."""
        self._write_epoch(trainer, is_updated=True)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Write the last epoch of a run that a signal has stopped."""
        if isinstance(exception, SIGTERMException):
            self._write_epoch(trainer, is_updated=True)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add one prompt's group."""
        if outputs is None:
            return
        names, buffers = zip(*prompt_data(trainer).eval_buffers.items(), strict=True)
        number = batch_idx + sum(len(buffer) for buffer in buffers[:dataloader_idx])
        group = buffers[dataloader_idx].micro_batch_rollouts[batch_idx]
        origin = weights_origin(trainer, pl_module)
        self._add(trainer, group, outputs, number, origin, names[dataloader_idx])

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write all groups."""
        self._write(trainer)

    def _write_epoch(self, trainer: Trainer, is_updated: bool) -> None:
        """Write the training buffer's groups, once.

        Args:
            trainer: of the run.
            is_updated: show the log-probabilities at the sampling; the policy has changed since.
        """
        origin, self._unwritten = self._unwritten, None
        if origin is None:
            return
        module, size = prl_module(trainer.lightning_module), prompt_data(trainer).group_size
        rollouts = prompt_data(trainer).train_buffer.rollouts
        kept = math.ceil(self.groups / trainer.world_size)
        for number in range(len(rollouts) // size):
            group = rollouts[number * size : (number + 1) * size]
            inspected = None
            if number < kept:
                batch = collate(group, 1, len(group)).to(module.device)
                old = batch.rollout_logprobs if batch.old_logprobs is None else batch.old_logprobs
                inspected = module.inspect(batch, old if is_updated else None)
            self._add(trainer, group, inspected, number, origin)
        self._write(trainer)

    def _add(
        self,
        trainer: Trainer,
        group: Sequence[Rollout],
        inspected: dict[str, Tensor] | None,
        number: int,
        origin: dict[str, int],
        name: str = "train",
    ) -> None:
        """Add a row for each completion of this rank's ``number``-th group."""
        for place, rollout in enumerate(group):
            row: dict[str, Any] = {
                "set": name,
                **origin,
                "group": number * trainer.world_size + trainer.global_rank,
                "reward": rollout.reward,
                "outcome_advantage": rollout.outcome_advantage.mean().item(),
                "length": rollout.completion.length,
                "finished": rollout.completion.finished,
                "prompt": None,
                "completion": None,
                "tokens": None,
                "is_sampled": None,
                **dict.fromkeys(PER_TOKEN),
            }
            if inspected is not None:
                row |= self._tokens(trainer, rollout, inspected, place)
            self._rows.append(row)

    def _tokens(
        self, trainer: Trainer, rollout: Rollout, inspected: dict[str, Tensor], place: int
    ) -> dict[str, Any]:
        """Return text, tokens and values per token of one row of ``inspected``."""
        decode = prompt_data(trainer).tokenizer.decode
        ids = rollout.completion.token_ids
        known = {name: values[place, : len(ids)].tolist() for name, values in inspected.items()}
        if rollout.outcome_advantage.ndim:  # otherwise equal for all tokens
            known["outcome_advantages"] = rollout.outcome_advantage.tolist()
        return known | {
            "prompt": prompt_text(rollout.prompt.source),
            "completion": rollout.text,
            "tokens": [decode([token]) for token in ids],
            "is_sampled": rollout.completion.is_sampled,
        }

    def _write(self, trainer: Trainer) -> None:
        """Write the rows of all ranks to one file and the loggers; a collective."""
        shares = gather(self._rows)
        self._rows = []
        if shares is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        rows = sorted((row for share in shares for row in share), key=lambda row: row["group"])
        if rows:
            name = f"epoch={rows[0]['epoch']:05d}"
            write_table(run_folder(trainer) / COMPLETIONS / f"{name}.parquet", rows)
            shown = [row for row in rows if row["tokens"] is not None]
            for logger in trainer.loggers:
                log_table(logger, name, shown, rows[0]["step"])


def log_table(logger: Logger, name: str, rows: Sequence[dict[str, Any]], step: int) -> None:
    """Log completions, if the logger can show a table or a text.

    Args:
        logger: of the Trainer.
        name: of the table.
        rows: of a CompletionLog.
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


def _cell(value: Any) -> str:
    if isinstance(value, str):
        return code_span(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
