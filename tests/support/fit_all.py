"""Several command lines one after the other in the processes of one run."""

from __future__ import annotations

from collections.abc import Sequence

from torch import distributed

from prl_lightning.cli import main


def fit_all(commands: Sequence[Sequence[str]]) -> None:
    for command in commands:
        main(command)
    if distributed.is_initialized():
        distributed.destroy_process_group()
