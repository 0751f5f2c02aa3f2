"""The ``prl`` command: LightningCLI with the rollout callback as a section of its own."""

from __future__ import annotations

import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
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
from prl_lightning.checks.contradictions import (
    Refused,
    refuse,
    warn_of_one_step,
)
from prl_lightning.checks.estimate import complaints, describe
from prl_lightning.checks.secrets import (
    Construction,
    Missing,
    Parser,
    SaveConfig,
    has_holes,
    misread,
)
from prl_lightning.data import PromptDataModule
from prl_lightning.models.export import export_checkpoint, refuse_existing
from prl_lightning.module import PRLModule
from prl_lightning.report import write_report
from prl_lightning.trainer import PRLTrainer, last_checkpoint

# Warnings that say nothing of the user's run, and why.
BESIDE_THE_POINT = (
    # The engine has a process group of its own; what is logged here is reduced over ranks.
    r"It is recommended to use `self\.log\(.*sync_dist=True\)`",
    # On purpose: dropout in the trainer and none in the engine would be two policies.
    r"Found \d+ module\(s\) in eval mode at the start of training",
    # `prl check` builds what `prl fit` would, from its own arguments.
    r"LightningCLI's args parameter is intended to run from within Python",
    # Between Lightning and torch.
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
)


class PRLCLI(LightningCLI):
    """``model``, ``data``, ``rollout``, ``completions`` and ``trainer``: each one class."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the sampling section; the prompts are tokenized as the policy is."""
        parser.add_lightning_class_args(RolloutCallback, "rollout")
        parser.add_lightning_class_args(CompletionLog, "completions")
        parser.add_lightning_class_args(UpdateGuard, "guard")
        parser.link_arguments("model.policy", "data.tokenizer")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Read files and words, or say all that is not understood.

        Raises:
            Refused: unknown keys, or values of another type.
        """
        read = partial(super().parse_arguments, parser)
        refuse(misread(read, list(sys.argv[1:] if args is None else args)))

    def instantiate_classes(self) -> None:
        """Make what the configuration asks for, or say all that is wrong with it.

        Raises:
            Refused: an object cannot be made, or settings do not go together.
        """
        self.making = Construction()
        # As Lightning does itself; the parser's `instantiators` are not in every jsonargparse.
        self.parser.add_instantiator(self.making, object, prepend=True)
        super().instantiate_classes()
        self.making.is_over = True
        errors = self.making.errors
        if errors and not has_holes([self.trainer, self.model, self.datamodule]):
            errors += self.found()
        refuse(errors)

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Put a ``metrics.csv`` into every run folder, beside whatever other logger there is.

        A hole where it, or a callback of it, cannot be made.
        Where the configuration has no logger, TensorBoard is the other one.
        """
        sections = ("trainer", *self._parser(self.subcommand).callback_keys)
        if has_holes([self._get(self.config_init, section) for section in sections]):
            return Missing()
        trainer: Any = self.making(super().instantiate_trainer, **kwargs)
        if isinstance(trainer, Missing):
            return trainer
        has_csv = any(isinstance(logger, CSVLogger) for logger in trainer.loggers)
        if has_csv or getattr(trainer, "fast_dev_run", False):
            return trainer
        root = Path(trainer.default_root_dir)
        # Every row at once: what is kept in memory is lost with a killed process.
        csv = CSVLogger(root.parent, name=root.name, flush_logs_every_n_steps=1)
        board = TensorBoardLogger(root.parent, name=root.name, version=csv.version)
        trainer.loggers = [csv, *(trainer.loggers or [board])]
        return trainer

    def parts(self) -> tuple[Trainer, PRLModule, PromptDataModule, RolloutCallback]:
        """What a run consists of."""
        return self.trainer, self.model, self.datamodule, rollout_callback(self.trainer)

    def found(self) -> list[str]:
        """What does not go together; a check is not of this machine."""
        found = complaints(*self.parts(), trains=self.subcommand in (None, "fit"))
        if self.subcommand is None:
            return found
        return [*found, *rollout_callback(self.trainer).engine.sampler.missing_requirements()]

    def before_fit(self) -> None:
        """Look ``--ckpt_path last`` up; a first run has none, so one command serves all.

        Raises:
            Refused: settings that do not go together.
        """
        refuse(self.found())
        if not self._found_last():
            rank_zero_info(f"No checkpoint under {self.trainer.default_root_dir}: a new run.")

    def before_validate(self) -> None:
        """Look ``--ckpt_path last`` up.

        Raises:
            Refused: there is none, or settings that do not go together.
        """
        found = self.found()
        if not self._found_last():
            found.append(
                f"--ckpt_path last: no complete checkpoint under trainer.default_root_dir="
                f"{self.trainer.default_root_dir}. Name a file, or the folder of the run."
            )
        refuse(found)
        if "verbose" in self.config_init[self.subcommand]:
            # EvaluationLog prints a table with intervals; Lightning's says the same without.
            self.config_init[self.subcommand]["verbose"] = False

    before_test = before_validate
    before_predict = before_validate

    def _found_last(self) -> bool:
        """Put the path of the newest checkpoint where "last" is asked for; False without one."""
        options = self.config_init[self.subcommand]
        if options["ckpt_path"] != "last":
            return True
        found = last_checkpoint(self.trainer)
        options["ckpt_path"] = None if found is None else str(found)
        return found is not None


class CheckCLI(PRLCLI):
    """Takes what ``prl fit`` takes, and what a run has written down, and runs nothing."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Accept what belongs to the run alone."""
        super().add_arguments_to_parser(parser)
        for name in ("ckpt_path", "weights_only"):
            parser.add_argument(f"--{name}", default=None, help="of prl fit; not looked at here")


def copy_configs(folder: Path = Path("configs")) -> None:
    """Copy the package's configurations, to run and to change.

    Args:
        folder: is made.

    Raises:
        FileExistsError: it is there already.
    """
    refuse_existing(folder, "folder")
    shutil.copytree(Path(__file__).with_name("configs"), folder)
    print(f"prl fit --config {folder}/quickstart.yaml")


# Commands that need no trainer.
TOOLS: dict[str, Callable[..., Any]] = {
    "configs": copy_configs,
    "export": export_checkpoint,
    "report": write_report,
}


def main(args: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        args: command line, by default the process's.
    """
    for message in BESIDE_THE_POINT:
        warnings.filterwarnings("ignore", message)
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # rewards of one's own lie beside one's configuration
    words = list(sys.argv[1:] if args is None else args)
    if words and words[0] in TOOLS:
        # As positional: `prl report RUN`, but `prl export --ckpt_path X --out Y`.
        auto_cli(
            TOOLS[words[0]],
            args=words[1:],
            as_positional=words[0] == "report",
            prog=f"prl {words[0]}",
        )
        return
    if words[:1] == ["check"]:
        # As on the machine that it is for: devices are counted, not looked for.
        here = [] if torch.cuda.is_available() else ["--trainer.accelerator=cpu"]
        cli = _command_line([*words[1:], *here], CheckCLI, run=False)
        refuse(cli.found())
        warn_of_one_step(cli.model, cli.parts()[-1])
        print(describe(*cli.parts()))
        return
    _command_line(None if args is None else words)


def run_command() -> None:
    """``prl``: what is asked for wrongly is a message, and not a traceback."""
    wrong = (ValueError, OSError) if set(sys.argv[1:2]) & set(TOOLS) else Refused
    try:
        main()
    except wrong as error:
        raise SystemExit(f"prl: {error}") from None


def _command_line(args: list[str] | None, kind: type[PRLCLI] = PRLCLI, run: bool = True) -> PRLCLI:
    return kind(
        PRLModule,
        PromptDataModule,
        args=args,
        run=run,
        parser_kwargs={
            "description": "Process Reward Learning: teach a language model to reason, by "
            "Lightning's Trainer.",
            "epilog": "prl check --help: does a configuration fit together, and what does it ask "
            "for; prl report --help: a run as one HTML file; prl export --help: a checkpoint as a "
            "Hugging Face folder; prl configs --help: the package's configurations, to change",
        },
        auto_configure_optimizers=False,
        parser_class=Parser,
        load_from_checkpoint_support=False,  # `Construction` makes the objects
        save_config_callback=SaveConfig,
        save_config_kwargs={"overwrite": True},
        trainer_class=PRLTrainer,
        trainer_defaults={
            "callbacks": [RunSummary(), EvaluationLog(), SaveOnSignal()],
            "default_root_dir": "runs/prl",
            "logger": False,
        },
    )
