"""Make a small run, and from it docs/report.png and docs/tensorboard.png. Needs Chromium.

    python tests/support/take_pictures.py

The run is `configs/arithmetic.yaml` with an evaluation every 5 epochs, in a temporary folder; its
base model stays in `runs/`. While its picture is taken, TensorBoard listens on a free port of
127.0.0.1.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from browser import system_browser
from prl_lightning.report import write_report
from tiny_runs import ARITHMETIC, fit

DOCS = ARITHMETIC.parents[1] / "docs"
WIDTH = 1280
CURVES = ("rollout/reward", "val/arithmetic/mean@16", "train/kl_ref", "train/entropy")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "arithmetic"
        fit("--trainer.check_val_every_n_epoch=5", f"--trainer.default_root_dir={root}")
        run = root / "version_0"
        write_report(str(run))
        with system_browser() as browser:
            picture_of_report(browser, run / "report.html")
            with tensorboard(run) as address:
                picture_of_tensorboard(browser, address)


def page_of(browser: Any, address: str, height: int) -> Any:
    page = browser.new_page(viewport={"width": WIDTH, "height": height}, color_scheme="light")
    page.goto(address)
    return page


def picture_of_report(browser: Any, file: Path) -> None:
    """From the top of the page to the curves."""
    page = page_of(browser, file.as_uri(), 1050)
    page.wait_for_selector("#panels svg text")
    page.screenshot(path=DOCS / "report.png")


@contextmanager
def tensorboard(run: Path) -> Iterator[str]:
    """Start it for a run; yield its address, which it prints once it listens."""
    command = ["-m", "tensorboard.main", f"--logdir={run.parent}", "--host=127.0.0.1", "--port=0"]
    with subprocess.Popen([sys.executable, *command], stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            found = (re.search(r"http://127\.0\.0\.1:\d+/", line) for line in server.stderr)
            yield next(match.group() for match in found if match)
        finally:
            server.terminate()


def picture_of_tensorboard(browser: Any, address: str) -> None:
    """Curves, pinned to the top of its time series."""
    pinned = json.dumps([{"plugin": "scalars", "tag": tag} for tag in CURVES])
    options = urlencode({"darkMode": "false", "smoothing": 0, "pinnedCards": pinned})
    page = page_of(browser, f"{address}?{options}#timeseries", 1040)
    page.wait_for_selector("card-view svg path")
    page.get_by_label("Close side pane").click()
    page.wait_for_load_state("networkidle")
    page.screenshot(path=DOCS / "tensorboard.png")


if __name__ == "__main__":
    main()
