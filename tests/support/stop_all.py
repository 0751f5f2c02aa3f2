"""Like fit_all, but continue after a run that stops; each rank writes how its runs ended."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from prl_lightning.cli import main


def ending(args: Sequence[str]) -> str:
    try:
        main(args)
    except SystemExit as exit:
        return f"exit {exit.code or 0}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "completed"


def stop_all(commands: Sequence[Sequence[str]], folder: str) -> None:
    endings = [ending(args) for args in commands]
    (Path(folder) / f"endings.{os.environ['RANK']}").write_text(json.dumps(endings))
