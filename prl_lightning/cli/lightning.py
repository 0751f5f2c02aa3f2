"""The commands with a Trainer: LightningCLI with the sections of a PRL run."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info

from prl_lightning.callbacks import (
    CompletionLog,
    EvaluationLog,
    RolloutCallback,
    RunSummary,
    SaveOnSignal,
    UpdateGuard,
)
from prl_lightning.callbacks.rollout import rollout_callback
from prl_lightning.checks.cautions import (
    warn_of_greedy,
    warn_of_one_step,
    warn_of_turn_end,
)
from prl_lightning.checks.contradictions import (
    ConfigurationError,
    contradictions,
    file_errors,
    raise_errors,
)
from prl_lightning.checks.estimate import describe
from prl_lightning.checks.secrets import SaveConfig
from prl_lightning.data import PromptDataModule
from prl_lightning.evaluation import Evaluation
from prl_lightning.module import PRLModule
from prl_lightning.rollouts.settings import RolloutSettings
from prl_lightning.runs.warnings import hide_irrelevant_warnings
from prl_lightning.trainer import PRLTrainer, last_checkpoint
from prl_lightning.trainer_access import csv_logger

# Options that take one object or a list of them.
OBJECTS = ("trainer.callbacks", "trainer.logger", "trainer.plugins", "rollout.rewards")


class Parser(LightningArgumentParser):
    """Lightning's parser: errors are one message, and a configuration's folder has modules."""

    def parse_path(self, cfg_path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Namespace:
        """Read a configuration, which can name reward functions of modules in its folder."""
        _import_from(Path(cfg_path).expanduser().resolve().parent)
        return super().parse_path(cfg_path, *args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the message.

        Raises:
            ConfigurationError: always.
        """
        raise ConfigurationError(message) from ex

    def add_class_arguments(self, theclass: Any, *args: Any, **kwargs: Any) -> Any:
        """Add a class's arguments; the files that ``data.train`` names are no configurations."""
        if theclass is PromptDataModule:
            kwargs["sub_configs"] = False
        return super().add_class_arguments(theclass, *args, **kwargs)

    def replace_objects(self) -> None:
        """Let objects of a second file replace the first one's.

        jsonargparse merges objects, also those in the same place of two lists, so that a callback
        would have arguments of another one.
        """
        actions: list[Any] = self._actions
        for action in actions:
            if action.dest in OBJECTS:
                action._check_type_ = partial(_check_anew, action._check_type_, action.dest)


def _check_anew(
    check: Callable[..., Any],
    option: str,
    value: Any,
    cfg: Any = None,
    append: bool = False,
    **options: Any,
) -> Any:
    """Call jsonargparse's check; objects that replace earlier ones are not merged with them."""
    is_list = isinstance(value, list) or (isinstance(value, str) and value.startswith("["))
    is_object = isinstance(value, dict | str) and "class_path" in value
    if (is_list or is_object) and not append:
        earlier, cfg = cfg.get(option) if cfg else None, None
        if isinstance(earlier, Namespace) and not is_list:  # two objects are merged after the check
            value = f"[{value}]" if isinstance(value, str) else [value]
    return check(value, cfg=cfg, append=append, **options)


class PRLCLI(LightningCLI):
    """Sections ``model``, ``data``, ``evaluation``, ``rollout``, ``completions``, ``guard``."""

    trainer: Trainer
    model: PRLModule
    datamodule: PromptDataModule

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        words = kwargs.get("args")
        self._first_word = next(iter(sys.argv[1:] if words is None else words), "")
        super().__init__(*args, **kwargs)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Return the subcommand that is run, or all: each takes half a second to set up."""
        every = LightningCLI.subcommands()
        return {k: v for k, v in every.items() if k == self._first_word} or every

    def _parse_ckpt_path(self) -> None:
        """Keep the configuration: Lightning would replace its model section by the checkpoint's."""

    def add_arguments_to_parser(self, parser: Parser) -> None:  # type: ignore[override]
        """Add the sections, and link what two of them share."""
        parser.add_class_arguments(Evaluation, "evaluation")
        parser.add_lightning_class_args(RolloutCallback, "rollout")
        parser.add_lightning_class_args(CompletionLog, "completions")
        parser.add_lightning_class_args(UpdateGuard, "guard")
        parser.link_arguments("model.policy", "data.tokenizer")
        parser.link_arguments("evaluation", "data.evaluation", apply_on="instantiate")
        parser.replace_objects()

    def instantiate_classes(self) -> None:
        """Create the configured objects.

        Raises:
            ConfigurationError: an object cannot be created.
        """
        try:
            super().instantiate_classes()
        except MisconfigurationException as error:
            raise ConfigurationError(f"trainer: {error}") from error
        except (ValueError, OSError, ImportError) as error:
            raise ConfigurationError(str(error)) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add a ``metrics.csv`` to every run, and TensorBoard if no logger is configured."""
        trainer: Trainer = super().instantiate_trainer(**kwargs)
        if csv_logger(trainer) or getattr(trainer, "fast_dev_run", False):
            return trainer
        root = Path(trainer.default_root_dir)
        # Flushed at every row: a killed process loses what is buffered.
        csv = CSVLogger(root.parent, name=root.name, flush_logs_every_n_steps=1)
        board = TensorBoardLogger(root.parent, name=root.name)  # the Trainer numbers both
        trainer.loggers = [csv, *(trainer.loggers or [board])]
        return trainer

    @property
    def rollout(self) -> RolloutSettings:
        """The settings of the rollout section."""
        return rollout_callback(self.trainer).settings

    def errors(self) -> list[str]:
        """Find everything that cannot work, before data is prepared or a model is loaded."""
        trains = self._trains
        errors = contradictions(self.trainer, self.model, self.datamodule, self.rollout, trains)
        errors += file_errors(self.model, self.datamodule, self.rollout, trains)
        if self.subcommand is not None:  # `prl check` may run on another machine
            errors += self.rollout.sampler.missing_requirements()
            errors += self._path_errors()
        return errors

    @property
    def _trains(self) -> bool:
        """Whether the command trains; `prl check` takes a file without training for evaluation."""
        if self.subcommand is not None:
            return self.subcommand == "fit"
        data, asked = self.datamodule, self.config.trainer
        has_limit = asked.max_epochs or asked.max_time or asked.max_steps != -1
        return bool(data.train_sources or has_limit or not data.eval_sources)

    def before_fit(self) -> None:
        """Resolve ``--ckpt_path last``; without a checkpoint it starts a new run.

        Raises:
            ConfigurationError: settings contradict each other.
        """
        raise_errors(self.errors())
        if not self._resolve_last():
            rank_zero_info(f"No checkpoint under {self.trainer.default_root_dir}: a new run.")

    def before_validate(self) -> None:
        """Resolve ``--ckpt_path last``.

        Raises:
            ConfigurationError: there is no checkpoint, or settings contradict each other.
        """
        errors = self.errors()
        if not self._resolve_last():
            errors.append(
                f"--ckpt_path last: no complete checkpoint under trainer.default_root_dir="
                f"{self.trainer.default_root_dir}. Name a file, or the folder of the run."
            )
        raise_errors(errors)
        if "verbose" in self.config_init[self.subcommand]:
            # EvaluationLog prints the same table with intervals.
            self.config_init[self.subcommand]["verbose"] = False

    before_test = before_validate
    before_predict = before_validate

    def _path_errors(self) -> Iterator[str]:
        """A checkpoint that does not exist, and a folder that cannot be created."""
        path = self.config_init[self.subcommand]["ckpt_path"] or "last"
        is_name = path in ("last", "best", "hpc") or path.startswith("registry") or "://" in path
        if not (is_name or Path(path).is_file() or (Path(path) / ".metadata").is_file()):
            yield f"--ckpt_path {path}: there is no such checkpoint. `last` finds the newest one."
        root = self.trainer.default_root_dir
        if "://" not in root:
            folder = next(at for at in (Path(root), *Path(root).parents) if at.exists())
            if not (folder.is_dir() and os.access(folder, os.W_OK)):
                yield f"trainer.default_root_dir={root}: {folder} cannot be written. Name another."

    def _resolve_last(self) -> bool:
        """Replace "last" by the path of the newest checkpoint; False if there is none."""
        options = self.config_init[self.subcommand]
        if options["ckpt_path"] != "last":
            return True
        found = last_checkpoint(self.trainer)
        options["ckpt_path"] = None if found is None else str(found)
        return found is not None


class CheckCLI(PRLCLI):
    """Accepts the arguments of ``prl fit`` and the config of a run, and runs nothing."""

    def add_arguments_to_parser(self, parser: Parser) -> None:  # type: ignore[override]
        """Accept the arguments of a run."""
        super().add_arguments_to_parser(parser)
        for name in ("ckpt_path", "weights_only"):
            parser.add_argument(f"--{name}", default=None, help="ignored; see prl fit")
        parser.add_argument(
            "--gpu",
            default=None,
            help="estimate the time on this GPU, such as H100 (default: here)",
        )


def run(args: list[str] | None) -> None:
    """Run a command of the Trainer.

    Args:
        args: command line, by default the process's.

    Raises:
        ConfigurationError: there is no configuration, or it cannot work.
    """
    if len(sys.argv[1:] if args is None else args) == 1:
        raise ConfigurationError(
            "there is no configuration: name one with --config FILE. `prl new FOLDER` writes one "
            "for data of your own, `prl configs` copies the package's."
        )
    _prepare()
    command_line(args)


def check(args: list[str]) -> None:
    """Check a configuration and print its sizes.

    Args:
        args: those of ``prl fit``.

    Raises:
        ConfigurationError: it cannot work.
    """
    _prepare()
    # There may be no GPU here, and only the number of devices matters.
    here = [] if torch.cuda.is_available() else ["--trainer.accelerator=cpu"]
    cli = command_line([*args, *here], CheckCLI, run=False)
    raise_errors(cli.errors())
    warn_of_one_step(cli.model, cli.rollout)
    warn_of_greedy(cli.datamodule)
    warn_of_turn_end(cli.model, cli.datamodule, cli.rollout)
    print(describe(cli.trainer, cli.model, cli.datamodule, cli.rollout, cli.config.gpu))


def _prepare() -> None:
    hide_irrelevant_warnings()
    _import_from(Path.cwd())


def _import_from(folder: Path) -> None:
    """Find a user's modules, such as reward functions, in a folder; installed ones come first."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def command_line(args: list[str] | None, kind: type[PRLCLI] = PRLCLI, run: bool = True) -> PRLCLI:
    """Parse a command line, create the configured objects, and run the command.

    Args:
        args: command line, by default the process's.
        kind: of the command line.
        run: whether ``args`` begins with a command, and it runs.
    """
    return kind(
        PRLModule,
        PromptDataModule,
        args=args,
        run=run,
        parser_kwargs={
            "description": "Process Reward Learning: teach a language model to reason, with "
            "Lightning's Trainer.",
        },
        auto_configure_optimizers=False,
        parser_class=Parser,
        save_config_callback=SaveConfig,
        save_config_kwargs={"overwrite": True},
        trainer_class=PRLTrainer,
        trainer_defaults={
            "callbacks": [RunSummary(), EvaluationLog(), SaveOnSignal()],
            "default_root_dir": "runs/prl",
            "logger": False,
        },
    )
