"""Put a run's data into the template: one self-contained HTML file."""

from __future__ import annotations

import json
import re
from base64 import b64encode
from hashlib import sha256
from pathlib import Path
from typing import Any

from prl_lightning.report.data import find_run, read_run
from prl_lightning.runs.tables import replacing

HERE = Path(__file__).parent
SCRIPTS = ("plot.js", "lines.js", "bars.js", "tokens.js", "epoch.js", "page.js")

# Written as JSON escapes: unescaped, they could end the script element or a line of script.
ESCAPES = {ord(char): f"\\u{ord(char):04x}" for char in "<>&\u2028\u2029"}


def write_report(run_dir: str, output: str | None = None) -> None:
    """Write a training run as one HTML page that opens without a network.

    The page has the curves, the evaluations with their intervals, and the stored completions with
    the process reward of each token.

    Args:
        run_dir: the folder of a run of prl fit, validate, test or predict, or its parent folder,
            of which the newest version_* that has trained is used.
        output: the file to write or replace; by default report.html in the folder of the run.

    Raises:
        FileNotFoundError: ``run_dir`` has nothing to show.
    """
    folder = find_run(run_dir)
    file = folder / "report.html" if output is None else Path(output)
    page = fill_template(read_run(folder))
    with replacing(file) as part:
        # JSON can hold a lone surrogate, but UTF-8 cannot.
        part.write_text(page, encoding="utf-8", errors="replace")
    print(file)


def fill_template(run: dict[str, Any]) -> str:
    """Put style, script and data into ``page.html``.

    Args:
        run: returned by ``read_run``.

    Returns:
        The page. Its content security policy allows only this style and this script.
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
    # In one pass, so that a marker inside the data is not replaced.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def escaped_json(value: Any) -> str:
    r"""Return JSON that can stand in a ``script`` element: it holds no markup.

    Args:
        value: made of JSON's types; numbers must be finite.

    Raises:
        ValueError: a number is NaN or infinite.

    Example:
        >>> escaped_json({"text": "</script>"})
        '{"text":"\\u003c/script\\u003e"}'
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.translate(ESCAPES)


def _digest(text: str) -> str:
    return f"sha256-{b64encode(sha256(text.encode()).digest()).decode()}"
