"""The page in a browser: what it shows, what it does, and what it does not let happen."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from prl_lightning.report import write_report
from report.made_run import HOSTILE, STORED, make_group, make_run, write_completions


def rows_of(run_dir: Path, epoch: int) -> list[dict[str, Any]]:
    return pq.ParquetFile(run_dir / "completions" / f"epoch={epoch:05d}.parquet").read().to_pylist()


def number(text: str) -> float:
    return float(text.replace("−", "-"))


def strip(page: Any) -> dict[str, str]:
    cells = page.locator(".strip dd").all()
    return {cell.get_attribute("data-field"): cell.text_content() for cell in cells}


def chosen_epoch(page: Any) -> str:
    return page.locator("nav.epochs [aria-pressed=true]").text_content()


def choose_group(page: Any, prompt: str) -> None:
    page.locator(".group", has_text=prompt[:40]).click()


def test_header_has_first_and_last_evaluation(report: Path, open_page: Any) -> None:
    page = open_page(report)
    assert page.title() == "arithmetic/version_0: training report"
    assert page.locator("#progress").text_content() == "30 updates · 30 epochs"
    tile = page.locator(".tile", has_text="same · mean@16").text_content()
    assert "0.120[0.0" in tile
    assert "→0.595[0.56" in tile
    assert page.locator("#panels figure").count() == 9


def test_arrow_keys_and_buttons_move_the_epoch(report: Path, open_page: Any) -> None:
    page = open_page(report)
    assert chosen_epoch(page) == str(STORED[-1])
    page.keyboard.press("ArrowLeft")
    assert chosen_epoch(page) == "20"
    assert page.locator("#epoch-title").text_content() == "Completions of epoch 20"
    page.get_by_label("Epoch before").click()
    assert chosen_epoch(page) == "10"
    for _ in range(9):
        page.keyboard.press("ArrowRight")
    assert chosen_epoch(page) == str(STORED[-1])


def test_hover_reads_a_curve_and_a_click_picks_an_epoch(report: Path, open_page: Any) -> None:
    page = open_page(report)
    curve = page.locator("#panels figure").first
    box = curve.locator("svg").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.42, box["y"] + 60)
    assert curve.locator(".readout").text_content().startswith("step 1")
    page.mouse.click(box["x"] + box["width"] * 0.42, box["y"] + 60)
    assert chosen_epoch(page) == "10"
    assert page.locator("#panels line.marked").count() == 9


def test_a_token_shows_the_numbers_of_the_file(run_dir: Path, report: Path, open_page: Any) -> None:
    page = open_page(report)
    row = next(row for row in rows_of(run_dir, STORED[-1]) if row["group"] == 2)
    choose_group(page, row["prompt"])
    page.locator(".choice").first.click()
    for place in (3, 20):
        page.locator(".token").nth(place).hover()
        shown = strip(page)
        assert shown["token"] == json.dumps(row["tokens"][place])
        assert shown["place"] == f"{place + 1} of {row['length']}"
        policy, reference = row["policy_logprobs"][place], row["ref_logprobs"][place]
        expected = {
            "process": row["process_rewards"][place],
            "advantage": row["advantages"][place],
            "policy": policy,
            "reference": reference,
            "log_ratio": policy - reference,
        }
        for name, value in expected.items():
            assert number(shown[name]) == float(f"{value:.4g}"), name
    assert page.locator(".token").all_text_contents() == row["tokens"]


def test_arrow_keys_move_between_tokens(report: Path, open_page: Any) -> None:
    page = open_page(report)
    page.locator(".token").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert strip(page)["place"].startswith("3 of ")
    assert chosen_epoch(page) == str(STORED[-1])


def test_shade_and_sign_follow_the_chosen_quantity(
    run_dir: Path, report: Path, open_page: Any
) -> None:
    page = open_page(report)
    rows = [row for row in rows_of(run_dir, STORED[-1]) if row["group"] == 2]
    choose_group(page, rows[0]["prompt"])
    page.locator(".choice").first.click()
    page.locator("#quantity").select_option("log_ratio")
    pairs = zip(rows[0]["policy_logprobs"], rows[0]["ref_logprobs"], strict=True)
    ratios = [own - other for own, other in pairs]
    classes = [token.get_attribute("class") for token in page.locator(".token").all()]
    assert ["positive" in kind for kind in classes] == [ratio > 0 for ratio in ratios]
    assert ["negative" in kind for kind in classes] == [ratio < 0 for ratio in ratios]
    assert ["ends" in kind for kind in classes] == rows[0]["step_ends"]


def test_groups_are_sorted_by_signal(report: Path, open_page: Any) -> None:
    page = open_page(report)
    texts = page.locator(".group").all_text_contents()
    signals = [float(text.rpartition("sd ")[2].split()[0]) for text in texts]
    assert signals == sorted(signals, reverse=True)
    assert "no signal" in texts[-1]
    assert page.locator(".group").first.locator(".square").count() == 8


def test_hostile_text_is_text(run_dir: Path, report: Path, open_page: Any) -> None:
    page = open_page(report)
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


def test_the_policy_stops_what_would_get_past(report: Path, browser: Any, tmp_path: Path) -> None:
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


def test_a_run_without_a_reference_says_so(open_page: Any, tmp_path: Path) -> None:
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
    write_completions(
        tmp_path / "completions" / "epoch=00000.parquet",
        [row | empty | {"completion": "", "length": 0, "reward": float("nan")}],
    )
    write_report(str(tmp_path))
    page = open_page(tmp_path / "report.html")
    assert page.locator("#progress").text_content() == "1 update · 1 epoch"
    assert "(no token)" in page.locator(".tokens").text_content()
    assert page.locator(".tile").text_content() == "same · mean@10.500"
    assert "NaN" not in page.locator("body").inner_text()


def test_a_run_with_metrics_alone_says_what_is_missing(
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


@pytest.mark.parametrize(("size", "width"), [("desktop", 1280), ("phone", 390)])
@pytest.mark.parametrize("scheme", ["light", "dark"])
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
    page.locator(".token").nth(12).hover()
    page.screenshot(path=folder / f"{size}-{scheme}-tokens.png")


def test_a_tap_shows_a_token(report: Path, open_page: Any) -> None:
    page = open_page(report, "phone")
    page.locator(".token").nth(4).tap()
    assert strip(page)["place"].startswith("5 of ")
