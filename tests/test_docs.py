"""What the documentation names is what is there."""

from __future__ import annotations

import re
from pathlib import Path

from tiny_runs import fit, metrics_of, tiny_overrides

ROOT = Path(__file__).parents[1]
METRICS = ROOT / "docs" / "metrics.md"


def documented() -> set[str]:
    """Names of the tables' first column under the prefix of their heading."""
    names: set[str] = set()
    for section in METRICS.read_text().split("\n## ")[1:]:
        prefixes = re.findall(r"`(\w+/(?:SET/)?)`", section.splitlines()[0])
        cells = re.findall(r"^\| (`.*?`) \|", section, flags=re.MULTILINE)
        found = re.findall(r"`([^`]+)`", " ".join(cells))
        names |= {prefix + name for prefix in prefixes for name in found}
    return names


def test_every_name_has_its_unit_its_meaning_and_what_to_do() -> None:
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
        "--trainer.logger.class_path=TensorBoardLogger",
        f"--trainer.logger.init_args.save_dir={tmp_path / 'board'}",
    )
    logged = set()
    for name in metrics_of(tmp_path):
        general = re.sub(r"@\d+$", "@k" if "pass@" in name else "@n", name)
        general = re.sub(r"^val/tiny/", "val/SET/", general)
        logged.add(re.sub(r"(reward|reward_failures)/\w+$", r"\1/NAME", general))
    assert logged <= documented()
    rare = {"rollout/waiting_seconds", "rollout/staleness"}
    assert {name for name in documented() if not name.startswith("test/")} - rare <= logged


def test_what_is_said_to_be_shown_by_a_test_is() -> None:
    text = (ROOT / "docs" / "gpu.md").read_text()
    functions = set(re.findall(r"`(test_\w+)`", text))
    files = set(re.findall(r"`((?:tests|benchmarks|constraints)/[\w/.]+)`", text))
    assert len(functions) > 10
    assert len(files) > 5
    tests = "".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name in functions if f"def {name}(" not in tests] == []
    assert [
        name for name in files if not (ROOT / name).exists() and not list(ROOT.glob(f"{name}*"))
    ] == []
