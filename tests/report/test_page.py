"""The page is one file, without foreign scripts, written completely or not at all."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path
from unittest.mock import Mock

import pytest

from prl_lightning.report import page, write_report
from prl_lightning.report.page import escaped_json, fill_template
from prl_lightning.runs import tables
from report.made_run import HOSTILE


@pytest.mark.parametrize("text", [*HOSTILE, "\u2028\u2029", "<!--<script>", "&lt;", "é漢🙂\\"])
def test_escaped_json_is_the_same_value_and_no_markup(text: str) -> None:
    escaped = escaped_json({text: [text, 1.5, None]})
    assert json.loads(escaped) == {text: [text, 1.5, None]}
    assert not set("<>&\u2028\u2029") & set(escaped)


def test_a_number_that_is_not_finite_is_an_error() -> None:
    with pytest.raises(ValueError, match="nan|JSON"):
        escaped_json({"loss": float("nan")})


def test_the_page_holds_its_data_and_two_scripts(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_report(str(run_dir), str(tmp_path / "deeper" / "page.html"))
    assert capsys.readouterr().out.strip() == str(tmp_path / "deeper" / "page.html")
    text = (tmp_path / "deeper" / "page.html").read_text()
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert data is not None
    run = json.loads(data[1])
    assert run["epochs"][1]["groups"][0]["completions"]
    assert text.count("<script") == 2
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in text


def test_the_policy_allows_this_script_and_style_alone() -> None:
    text = fill_template({})
    policy = re.search(r'Content-Security-Policy" content="(.*?)"', text)
    assert policy is not None
    assert policy[1].startswith("default-src 'none';")
    for tag in ("script", "style"):
        inside = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.S)
        digest = base64.b64encode(hashlib.sha256(inside[0].encode()).digest()).decode()
        assert len(inside) == 1
        assert f"{tag}-src 'sha256-{digest}'" in policy[1]


def test_markers_in_the_data_are_not_filled() -> None:
    assert '"{{style}} \\\\1"' in fill_template({"text": "{{style}} \\1"})


def test_data_reaches_the_page_as_text_only() -> None:
    script = "".join((page.HERE / name).read_text() for name in page.SCRIPTS)
    unsafe = r"(inner|outer)HTML|insertAdjacentHTML|document\.write|eval\(|srcdoc|new Function"
    assert not re.search(unsafe, script)


def test_a_failure_leaves_the_old_page(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "report.html"
    file.write_text("the old page")
    monkeypatch.setattr(tables.Path, "replace", Mock(side_effect=OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_report(str(run_dir), str(file))
    assert file.read_text() == "the old page"
    assert list(tmp_path.iterdir()) == [file]


def test_a_lone_surrogate_can_be_written(tmp_path: Path) -> None:
    line = '{"step": 0, "sets": {"\\ud83d": {"metrics": {}}}}\n'
    (tmp_path / "evaluations.jsonl").write_text(line)
    write_report(str(tmp_path))
    assert '"sets":{"?"' in (tmp_path / "report.html").read_text()
