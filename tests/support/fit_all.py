"""Several command lines in one process: `torchrun fit_all.py runs.json` pays its start once."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from prl_lightning.cli import main

if __name__ == "__main__":
    for args in json.loads(Path(sys.argv[1]).read_text()):
        main(args)
