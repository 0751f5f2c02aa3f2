"""A synthetic run, its page, and a browser, for the tests of the report."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prl_lightning.report import write_report
from report.made_run import make_run

SIZES = {"desktop": (1280, 900), "phone": (390, 844)}


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with all its files. Tests must not change it."""
    return make_run(tmp_path_factory.mktemp("runs") / "arithmetic" / "version_0")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """The system's Chromium, headless."""
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    from browser import system_browser

    try:
        with system_browser() as started:
            yield started
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def report(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of the synthetic run."""
    file = tmp_path_factory.mktemp("report") / "report.html"
    write_report(str(run_dir), str(file))
    return file


@pytest.fixture
def open_page(browser: Any) -> Iterator[Any]:
    """Open a file. The page must log nothing and request nothing but the file."""
    said: list[str] = []
    asked: list[str] = []
    contexts = []

    def open_file(file: Path, size: str = "desktop", scheme: str = "light") -> Any:
        width, height = SIZES[size]
        viewport = {"width": width, "height": height}
        touch = size == "phone"
        context = browser.new_context(viewport=viewport, color_scheme=scheme, has_touch=touch)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(file.as_uri())
        page.wait_for_selector("h1:not(:empty)")
        page.wait_for_selector("#panels svg text")
        return page

    yield open_file
    for context in contexts:
        context.close()
    assert said == []
    assert [url for url in asked if not url.endswith("report.html")] == []
