"""The page in a browser: what it shows and does, and that text of the run stays text."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from prl_lightning.report import write_report
from prl_lightning.runs.tables import read_table, write_table
from report.made_run import HOSTILE, STORED, make_group, make_run

pytestmark = pytest.mark.process


def rows_of(run_dir: Path, epoch: int) -> list[dict[str, Any]]:
    return read_table(run_dir / "completions" / f"epoch={epoch:05d}.parquet")


def strip(page: Any) -> dict[str, str]:
    cells = page.locator(".strip dd").all()
    return {cell.get_attribute("data-field"): cell.text_content() for cell in cells}


def chosen_epoch(page: Any) -> str:
    return page.locator("nav.epochs [aria-pressed=true]").text_content()


def choose_group(page: Any, prompt: str) -> None:
    page.locator(".group", has_text=prompt[:40]).click()
    page.locator(".choice").first.click()


def test_header_curves_and_the_choice_of_an_epoch(report: Path, open_page: Any) -> None:
    page = open_page(report)
    assert page.title() == "arithmetic/version_0: training report"
    assert page.locator("#progress").text_content() == "30 updates · 30 epochs"
    tile = page.locator(".tile", has_text="same · mean@16").text_content()
    assert "0.120[0.0" in tile
    assert "→0.595[0.55" in tile
    assert page.locator("#panels figure").count() == 9
    # The arrow keys and the buttons.
    assert chosen_epoch(page) == str(STORED[-1])
    page.keyboard.press("ArrowLeft")
    assert chosen_epoch(page) == "20"
    assert page.locator("#epoch-title").text_content() == "Completions of epoch 20"
    page.get_by_label("Previous epoch").click()
    assert chosen_epoch(page) == "10"
    for _ in range(9):
        page.keyboard.press("ArrowRight")
    assert chosen_epoch(page) == str(STORED[-1])
    # Hovering reads a curve, and a click picks the nearest epoch.
    curve = page.locator("#panels figure").first
    curve.scroll_into_view_if_needed()
    box = curve.locator("svg").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.42, box["y"] + 60)
    assert curve.locator(".readout").text_content().startswith("step 1")
    page.mouse.click(box["x"] + box["width"] * 0.42, box["y"] + 60)
    assert chosen_epoch(page) == "10"
    assert page.locator("#panels line.marked").count() == 9


def test_tokens_show_the_numbers_of_the_file(run_dir: Path, report: Path, open_page: Any) -> None:
    page = open_page(report)
    row = next(row for row in rows_of(run_dir, STORED[-1]) if row["group"] == 2)
    choose_group(page, row["prompt"])
    assert page.locator(".token").all_text_contents() == row["tokens"]
    pairs = zip(row["policy_logprobs"], row["ref_logprobs"], strict=True)
    ratios = [policy - reference for policy, reference in pairs]
    columns = {
        "process": row["process_rewards"],
        "advantage": row["advantages"],
        "policy": row["policy_logprobs"],
        "reference": row["ref_logprobs"],
        "log_ratio": ratios,
    }
    for place in (3, 20):
        page.locator(".token").nth(place).hover()
        shown = strip(page)
        assert shown["token"] == json.dumps(row["tokens"][place])
        assert shown["place"] == f"{place + 1} of {row['length']}"
        for name, values in columns.items():
            assert float(shown[name].replace("−", "-")) == float(f"{values[place]:.4g}"), name
    # Shade and sign follow the chosen quantity.
    page.locator("#quantity").select_option("log_ratio")
    classes = [token.get_attribute("class") for token in page.locator(".token").all()]
    assert ["positive" in kind for kind in classes] == [ratio > 0 for ratio in ratios]
    assert ["negative" in kind for kind in classes] == [ratio < 0 for ratio in ratios]
    assert ["ends" in kind for kind in classes] == row["step_ends"]
    # On a token the arrow keys do not change the epoch.
    page.locator(".token").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert strip(page)["place"].startswith("3 of ")
    assert chosen_epoch(page) == str(STORED[-1])


def test_what_an_environment_wrote_is_marked_and_has_no_numbers(
    open_page: Any, tmp_path: Path
) -> None:
    folder = make_run(tmp_path / "run")
    file = folder / "completions" / f"epoch={STORED[-1]:05d}.parquet"
    rows = read_table(file)
    for row in rows:
        if row["tokens"] is not None:
            row["is_sampled"] = [place not in (3, 4) for place in range(len(row["tokens"]))]
    write_table(file, rows)
    write_report(str(folder))
    page = open_page(folder / "report.html")
    classes = [token.get_attribute("class") for token in page.locator(".token").all()]
    assert [i for i, kind in enumerate(classes) if "context" in kind] == [3, 4]
    assert not any("positive" in classes[i] or "negative" in classes[i] for i in (3, 4))
    for place, has_numbers in ((2, True), (3, False)):
        page.locator(".token").nth(place).hover()
        shown = strip(page)
        names = ("process", "advantage", "policy", "reference", "log_ratio")
        assert [shown[name] != "–" for name in names] == [has_numbers] * 5
    assert "what the environment wrote" in page.locator("#completion").text_content()


def test_groups_are_sorted_by_signal_and_hostile_text_is_text(
    run_dir: Path, report: Path, open_page: Any
) -> None:
    page = open_page(report)
    texts = page.locator(".group").all_text_contents()
    signals = [float(text.rpartition("sd ")[2].split()[0]) for text in texts]
    assert signals == sorted(signals, reverse=True)
    assert "no signal" in texts[-1]
    assert page.locator(".group").first.locator(".square").count() == 8
    choose_group(page, HOSTILE[0])
    for place, text in enumerate(HOSTILE):
        page.locator(".choice").nth(place).click()
        assert text in page.locator(".tokens").text_content()
    assert HOSTILE[0] in page.locator(".prompt").text_content()
    page.locator("#config summary").click()
    assert page.locator("#config pre").text_content() == (run_dir / "config.yaml").read_text()
    assert page.evaluate("window.stolen === undefined")
    assert page.evaluate("document.scripts.length") == 2
    assert page.locator("img").count() == 0


def test_the_content_security_policy_stops_injected_markup(
    report: Path, browser: Any, tmp_path: Path
) -> None:
    script = "<script>window.stolen = true</script><img src='https://example.org/x.png'>"
    file = tmp_path / "report.html"
    file.write_text(report.read_text().replace("</main>", f"{script}</main>", 1))
    page = browser.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.goto(file.as_uri())
    assert page.evaluate("window.stolen === undefined")
    assert len([text for text in said if "Content Security Policy" in text]) == 2
    page.close()


def test_a_run_without_a_reference(open_page: Any, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", reference=False)
    write_report(str(run))
    page = open_page(run / "report.html")
    assert "No reference model in this run" in page.locator("#completion").text_content()
    assert page.locator("#quantity").input_value() == "advantage"
    assert strip(page)["process"] == "–"


def test_a_run_of_one_update_without_numbers(open_page: Any, tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("rollout/reward,step,train/loss\n0.5,0,nan\n")
    (tmp_path / "evaluations.jsonl").write_text(
        '{"step": 0, "sets": {"same": {"metrics": {"mean@1": [0.5, null, null]}, '
        '"pass_curve": {"k": [1], "pass": [0.5], "low": [null], "high": [null]}}}}\n'
    )
    row = make_group(0, 0, random.Random(0), reference=False)[0]
    empty = dict.fromkeys(("policy_logprobs", "advantages", "step_ends", "tokens"), [])
    write_table(
        tmp_path / "completions" / "epoch=00000.parquet",
        [row | empty | {"completion": "", "length": 0, "reward": float("nan")}],
    )
    write_report(str(tmp_path))
    page = open_page(tmp_path / "report.html")
    assert page.locator("#progress").text_content() == "1 update · 1 epoch"
    assert "(no token)" in page.locator(".tokens").text_content()
    assert page.locator(".tile").text_content() == "same · mean@10.500"
    assert "NaN" not in page.locator("body").inner_text()


def test_a_run_with_metrics_alone_names_missing_files(
    run_dir: Path, open_page: Any, tmp_path: Path
) -> None:
    shutil.copy(run_dir / "metrics.csv", tmp_path)
    write_report(str(tmp_path))
    page = open_page(tmp_path / "report.html")
    assert page.locator("#notes li").count() == 3
    assert page.locator("#panels figure").count() == 8
    assert not any(page.locator(part).is_visible() for part in ("#passes", "#epoch", "#config"))
    page.keyboard.press("ArrowRight")
    page.locator("#others summary").click()
    page.wait_for_selector("#others figure svg text")


@pytest.mark.parametrize(
    ("size", "width", "scheme"), [("desktop", 1280, "light"), ("phone", 390, "dark")]
)
def test_nothing_is_wider_than_the_screen(
    report: Path, open_page: Any, tmp_path: Path, size: str, width: int, scheme: str
) -> None:
    page = open_page(report, size, scheme)
    page.locator("#others summary").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    folder = Path(os.environ.get("PRL_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=folder / f"{size}-{scheme}-page.png", full_page=True)
    page.locator("#completion").scroll_into_view_if_needed()
    token = page.locator(".token").nth(4)
    token.tap() if size == "phone" else token.hover()
    assert strip(page)["place"].startswith("5 of ")
    page.screenshot(path=folder / f"{size}-{scheme}-tokens.png")
