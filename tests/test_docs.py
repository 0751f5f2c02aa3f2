"""The documentation names metrics, files, tests and Python objects that exist."""

from __future__ import annotations

import re
from pathlib import Path
from pkgutil import resolve_name

import pytest
import yaml

import prl_lightning
from tiny_runs import fit, metrics_of, tiny_overrides

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[1]
METRICS = ROOT / "docs" / "metrics.md"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = "benchmarks|configs|constraints|docs|prl_lightning|tests"


def anchors(page: Path) -> set[str]:
    """GitHub's anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def documented() -> set[str]:
    """Names of the tables' first column under the prefix of their heading."""
    names: set[str] = set()
    for section in METRICS.read_text().split("\n## ")[1:]:
        prefixes = re.findall(r"`(\w+/(?:SET/)?)`", section.splitlines()[0])
        cells = re.findall(r"^\| (`.*?`) \|", section, flags=re.MULTILINE)
        found = re.findall(r"`([^`]+)`", " ".join(cells))
        names |= {prefix + name for prefix in prefixes for name in found}
    return names


def test_every_metric_has_a_unit_a_meaning_and_advice() -> None:
    rows = re.findall(r"^\| (`.*?) \|$", METRICS.read_text(), flags=re.MULTILINE)
    assert len(rows) > 30
    for row in rows:
        cells = re.split(r"(?<!\\) \| ", row)
        assert len(cells) == 4, row
        assert all(cell.strip() for cell in cells), row


def test_every_logged_name_is_documented(tied_model: str, tmp_path: Path) -> None:
    fit(
        *tiny_overrides(tied_model, tmp_path),
        "--rollout.rewards=[sample_rewards.even_digits, prl_lightning.rewards.MathReward]",
        "--model.objective.engine_correction={high: 2}",
        "--model.objective.target=0.1",
        "--rollout.refill=2",
        "--data.difficulty={passes: 1}",
        "--data.micro_batch_tokens=100",
        "--trainer.logger.class_path=TensorBoardLogger",
        f"--trainer.logger.init_args.save_dir={tmp_path / 'board'}",
    )
    logged = set()
    for name in metrics_of(tmp_path):
        general = re.sub(r"@\d+$", "@k" if "pass@" in name else "@n", name)
        general = re.sub(r"^val/tiny/", "val/SET/", general)
        logged.add(re.sub(r"(reward|reward_failures)/\w+$", r"\1/NAME", general))
    assert logged <= documented()
    rare = {
        f"rollout/{n}" for n in ("waiting_seconds", "staleness", "task_reward/NAME", "level/NAME")
    } | {"train/kl_ref/NAME", "train/beta/NAME"}
    rare |= {f"rollout/{n}" for n in ("turns", "calls", "call_errors", "environment_failures")}
    assert {name for name in documented() if not name.startswith("test/")} - rare <= logged


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == prl_lightning.__version__
    # What the format's version 1.2.0 requires.
    assert {"cff-version", "message", "title", "authors"} <= set(citation)


def test_the_readme_links_every_page() -> None:
    linked = set(re.findall(r"\]\((docs/\w+\.md)\)", PAGES[0].read_text()))
    assert linked == {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", page.read_text())
    for target, anchor in links:
        file = (page.parent / target) if target else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), f"{target}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_named_paths_exist(page: Path) -> None:
    """Whole paths from the repository's root; a test's file may stand without its folder."""
    text = page.read_text()
    paths = re.findall(rf"(?<![\w./-])((?:{FOLDERS})/[\w./*-]*[\w/])", text)
    assert [path for path in paths if not list(ROOT.glob(path.rstrip("/")))] == []
    tests = re.findall(r"`(test_\w+\.py)`", text)
    assert [name for name in tests if not list((ROOT / "tests").rglob(name))] == []


def test_the_table_of_folders_is_the_packages() -> None:
    table = (ROOT / "docs" / "reading_the_code.md").read_text().partition("\n## Folders")[2]
    cells = re.findall(r"^\| (`.*?) \|", table, flags=re.MULTILINE)
    listed = {name.rstrip("/") for name in re.findall(r"`([^`]+)`", " ".join(cells))}
    package = ROOT / "prl_lightning"
    folders = {str(file.parent.relative_to(package)) for file in package.rglob("*.py")} - {"."}
    assert folders <= listed
    assert [name for name in listed if not (package / name).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_named_objects_exist(page: Path) -> None:
    """Import paths of the package, ``Class.method`` of its classes, and test functions."""
    text = page.read_text()
    for name in re.findall(r"(?<![\w/])prl_lightning(?:\.\w+)+", text):
        resolve_name(name)
    package = "".join(file.read_text() for file in (ROOT / "prl_lightning").rglob("*.py"))
    for kind, member in re.findall(r"`([A-Z]\w+)\.([a-z]\w*)`", text):
        if f"class {kind}" in package:
            assert re.search(rf"def {member}\(|^    {member}: ", package, re.MULTILINE), member
    tests = "".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    functions = re.findall(r"`(test_\w+)`", text)
    assert [name for name in functions if f"def {name}(" not in tests] == []
