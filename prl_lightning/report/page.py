"""A run's data in the template: one HTML file that needs nothing beside it."""

from __future__ import annotations

import json
import os
import re
from base64 import b64encode
from hashlib import sha256
from pathlib import Path
from typing import Any

from prl_lightning.report.data import find_run, read_run

HERE = Path(__file__).parent
SCRIPTS = ("plot.js", "lines.js", "bars.js", "tokens.js", "epoch.js", "page.js")

# As JSON escapes; raw, they could end the script element that holds the data, or a line of it.
ESCAPES = {ord(char): f"\\u{ord(char):04x}" for char in "<>&\u2028\u2029"}


def write_report(run_dir: str, output: str | None = None) -> None:
    """Write a training run as one HTML page that opens without a network.

    It has the curves, the evaluations with their intervals, and, for epochs whose completions are
    stored, every completion with its process rewards, token by token.

    Args:
        run_dir: the folder of the run, with metrics.csv; or the one above it, whose newest
            version_* that has trained is taken. That of a prl validate, test or predict, too.
        output: the file to write, by default report.html in that folder. One that is there is
            replaced.

    Raises:
        FileNotFoundError: there is nothing to show in ``run_dir``.
    """
    folder = find_run(run_dir)
    file = folder / "report.html" if output is None else Path(output)
    page = fill_template(read_run(folder))
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.part")
    try:
        # Half of a pair of surrogates can be in JSON, but not in a file.
        part.write_text(page, encoding="utf-8", errors="replace")
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)
    print(file)


def fill_template(run: dict[str, Any]) -> str:
    """Put style, script and data into ``page.html``.

    Args:
        run: as ``read_run`` gives it.

    Returns:
        The page. Its policy lets only this style and this script run.
    """
    style = (HERE / "page.css").read_text(encoding="utf-8")
    script = "\n".join((HERE / name).read_text(encoding="utf-8") for name in SCRIPTS)
    parts = {
        "policy": f"default-src 'none'; style-src '{_digest(style)}'; "
        f"script-src '{_digest(script)}'; base-uri 'none'; form-action 'none'",
        "style": style,
        "data": escaped_json(run),
        "script": script,
    }
    template = (HERE / "page.html").read_text(encoding="utf-8")
    # In one go: what is put in is not searched.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def escaped_json(value: Any) -> str:
    r"""JSON that nothing in a ``script`` element can end or open.

    Args:
        value: what JSON can hold; a number that is not finite is an error.

    Returns:
        JSON of the same value.

    Example:
        >>> escaped_json({"text": "</script>"})
        '{"text":"\\u003c/script\\u003e"}'
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.translate(ESCAPES)


def _digest(text: str) -> str:
    return f"sha256-{b64encode(sha256(text.encode()).digest()).decode()}"
