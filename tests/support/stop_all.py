"""Like fit_all, but continue after a run that stops; each rank writes how its runs ended."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from prl_lightning.cli import main


def ending(args: list[str]) -> str:
    try:
        main(args)
    except SystemExit as exit:
        return f"exit {exit.code or 0}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "completed"


if __name__ == "__main__":
    endings = [ending(args) for args in json.loads(Path(sys.argv[1]).read_text())]
    Path(f"{sys.argv[1]}.{os.environ['RANK']}").write_text(json.dumps(endings))
