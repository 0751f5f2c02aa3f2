"""The ``prl`` command. Each of its commands imports what it needs, and no more."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches

TRAINER_COMMANDS = {
    "fit": "train a policy",
    "validate": "evaluate a policy or a checkpoint on the evaluation sets",
    "test": "evaluate once more, logged as test/",
    "predict": "sample the evaluation sets and write completions with the credit of each token",
}
TOOL_COMMANDS = {
    "report": "write a run as one HTML file",
    "export": "write a checkpoint as a Hugging Face folder",
    "configs": "copy the package's configurations into a folder",
    "new": "create a folder for data and rewards of your own",
}
COMMANDS = {
    **TRAINER_COMMANDS,
    "check": "check a configuration; estimate memory and time; nothing is loaded",
    **TOOL_COMMANDS,
}


def main(args: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        args: command line, by default the process's.

    Raises:
        ValueError: there is no such command, or what it was asked for cannot work.
        OSError: a file cannot be read or written.
    """
    words = list(sys.argv[1:] if args is None else args)
    first = words[0] if words else "--help"
    if first in ("-h", "--help"):
        print(overview())
    elif first in TOOL_COMMANDS:
        from prl_lightning.cli.tools import run_tool

        run_tool(first, words[1:])
    elif first == "check" or first in TRAINER_COMMANDS or first.startswith("-"):
        with _uncollected():
            from prl_lightning.cli.lightning import check, run

        if first == "check":
            check(words[1:])
        else:
            run(None if args is None else words)
    else:
        near = get_close_matches(first, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(COMMANDS)}."
        raise ValueError(f"there is no command {first!r}: {hint}")


@contextmanager
def _uncollected() -> Iterator[None]:
    """Import without garbage collection: a sixth of the time, and modules are no garbage."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def overview() -> str:
    """Return one line for each command."""
    lines = [f"  {name:<10}{text}" for name, text in COMMANDS.items()]
    return "\n".join([
        "usage: prl COMMAND ...",
        "",
        "Process Reward Learning: teach a language model to reason, on PyTorch Lightning.",
        "",
        *lines,
        "",
        "prl COMMAND --help has the options of a command.",
        "A first run: prl configs, then prl fit --config configs/arithmetic.yaml",
        "Your own: prl new my-project",
    ])  # fmt: skip


def run_command() -> None:
    """Run ``prl``; a user's error is a message, not a traceback."""
    try:
        main()
    except (ValueError, OSError) as error:
        if not _is_users(error):
            raise
        raise SystemExit(f"prl: {error}") from None


def _is_users(error: Exception) -> bool:
    """Whether an error is in what the user asked for; a run's other errors keep their traceback."""
    if not set(sys.argv[1:2]) & {*TRAINER_COMMANDS, "check"}:
        return True
    from prl_lightning.checks.contradictions import ConfigurationError
    from prl_lightning.data import DataError

    return isinstance(error, ConfigurationError | DataError)
