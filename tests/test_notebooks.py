"""The notebooks of docs/ run without a network, and their models learn.

`make examples` executes them, and CI.
"""

from __future__ import annotations

import re
from pathlib import Path
from statistics import fmean
from typing import Any

import nbformat
import pytest
import torch
from transformers import AutoModelForCausalLM

from notebooks import NOTEBOOKS, ROOT, code_cells, execute
from prl_lightning.runs.files import EVALUATIONS, METRICS, read_evaluations, read_metrics

pytestmark = pytest.mark.process

Node = nbformat.NotebookNode


def executed(name: str, folder: Path) -> Node:
    """Execute a notebook; its stored outputs must be of the same kinds."""
    notebook = ROOT / "docs" / "notebooks" / f"{name}.ipynb"
    node = execute(notebook, folder)
    assert kinds(node) == kinds(nbformat.read(notebook, as_version=4))
    return node


def kinds(node: Node) -> list[list[list[str]]]:
    cells = code_cells(node)
    return [[[o.output_type, *sorted(o.get("data", {}))] for o in c.outputs] for c in cells]


def texts(node: Node) -> list[str]:
    """The printed texts and Markdown of all outputs, in order."""
    outputs = [output for cell in code_cells(node) for output in cell.outputs]
    return [
        output.get("text") or output.data.get("text/markdown", output.data.get("text/plain"))
        for output in outputs
    ]


def accuracies(run: Path) -> list[float]:
    evaluations, _ = read_evaluations(run / EVALUATIONS)
    (sets,) = {tuple(evaluation["sets"]) for evaluation in evaluations}
    found: list[dict[str, Any]] = [e["sets"][sets[0]]["metrics"] for e in evaluations]
    return [metrics[next(iter(metrics))][0] for metrics in found]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_stored_outputs_are_of_one_execution_and_of_no_machine(notebook: Path) -> None:
    node = nbformat.read(notebook, as_version=4)
    cells = code_cells(node)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    said = "\n".join(texts(node))
    assert not re.search(r"(^|[\s'\"])/\w|[Ww]arning|Error", said), said
    assert notebook.stat().st_size < 300_000


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_a_notebook_is_linked_and_its_links_lead_to_files(notebook: Path) -> None:
    assert str(notebook.relative_to(ROOT)) in (ROOT / "README.md").read_text()
    cells = nbformat.read(notebook, as_version=4).cells
    markdown = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\((?!https?:)([^)#]+)", markdown)
    assert links
    assert [link for link in links if not (notebook.parent / link).is_file()] == []
    paths = re.findall(r"`(configs/[\w./-]+)`", markdown)
    assert [path for path in paths if not (ROOT / path).is_file()] == []


@pytest.mark.example
def test_own_data_and_an_own_reward_make_a_better_model(tmp_path: Path) -> None:
    """The reward of a cell is called in a subprocess, and what is exported is the trained model."""
    node = executed("own_data", tmp_path)
    run = tmp_path / "runs" / "own" / "version_0"
    before, after = accuracies(run)
    assert after > before + 0.1
    assert not (run / "reward_failures.jsonl").exists()
    exported, base = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "runs" / folder).lm_head.weight
        for folder in ("own/exported", "sums/base")
    )
    assert not torch.equal(exported, base)
    questions = texts(node)[-1].splitlines()
    assert len(questions) == 4
    assert all(re.search(r"\\boxed\{\d\}'$", line) for line in questions)


@pytest.mark.example
def test_the_credit_of_a_run_is_read_from_its_files(tmp_path: Path) -> None:
    node = executed("reading_a_run", tmp_path)
    run = tmp_path / "runs" / "sums" / "version_0"
    first, *_, last = accuracies(run)
    assert last > first + 0.1
    *_, table, report = texts(node)
    assert (tmp_path / report.strip()).is_file()
    cells = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    advantages, again = ([float(cell[place]) for cell in cells] for place in (3, 4))
    assert advantages == pytest.approx(again, abs=2e-3)
    assert len(set(advantages)) > 1  # the tokens of a completion differ


@pytest.mark.example
def test_a_student_moves_towards_its_teacher(tmp_path: Path) -> None:
    executed("distil", tmp_path)
    run = tmp_path / "runs" / "distil" / "version_0"
    _, kl = read_metrics(run / METRICS)["train/kl_ref"]
    assert fmean(kl[-3:]) < fmean(kl[:3]) / 2
    first, *_, last = accuracies(run)
    assert last > first + 0.2
    assert (tmp_path / "runs" / "distil" / "exported" / "config.json").is_file()
