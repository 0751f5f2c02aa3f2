"""The tables and the pictures of credit.py and credit_real.py."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from compare import over_seeds, plain
from prl_lightning.runs.text import markdown_table

COLORS = matplotlib.colormaps["tab10"].colors
RUN = ["method", "beta"]


def table(found: pd.DataFrame) -> str:
    """Markdown: AUROC and hit@1 after the last iteration, means over runs with their intervals."""
    last = found[found.iteration == found.iteration.max()]
    heads = ["completions of", *RUN, "seeds", "quantity", "AUROC", "hit@1", "share of slips"]
    lines = []
    for names, rows in last.groupby(["completions_of", *RUN, "quantity"], sort=False):
        *run, quantity = names
        found_by = (over_seeds(rows[m]) for m in ("auroc", "hit@1"))
        named = [*map(str, run), str(len(rows)), str(quantity)]
        lines.append([*named, *found_by, f"{rows.chance.mean():.3f}"])
    return markdown_table(heads, lines) + "\n"


def draw(found: pd.DataFrame, file: Path) -> None:
    """AUROC over training: a column for each method, its own completions above the base's."""
    runs = list(found.groupby(RUN, sort=False))
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    axes = figure.subplots(2, len(runs), sharex=True, sharey=True, squeeze=False)
    for column, ((method, beta), of_run) in enumerate(runs):
        for row, whose in enumerate(("own", "base")):
            panel = axes[row, column]
            of_panel = of_run[of_run.completions_of == whose]
            groups = of_panel.groupby("quantity", sort=False)
            for color, (quantity, rows) in zip(COLORS, groups, strict=False):
                means = rows.groupby("iteration").auroc.mean()
                panel.plot(means, marker="o", ms=3.5, lw=1.4, color=color, label=quantity)
                panel.plot(
                    rows.iteration, rows.auroc, ls="", marker=".", ms=3, color=color, alpha=0.4
                )
            panel.axhline(0.5, c="gray", lw=0.8, ls=":")
            panel.set(
                title=f"{method} {beta or ''}".strip() + f": {whose} completions", ylim=(0.2, 1.02)
            )
            plain(panel)
        axes[1, column].set(xlabel="iteration", xticks=sorted(found.iteration.unique()))
    axes[0, 0].set_ylabel("AUROC of slips")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    figure.savefig(file, dpi=110)


def draw_example(example: dict[str, object], file: Path) -> None:
    """One completion: each quantity at each token, and the line of the slip."""
    values: dict[str, list[float]] = example["quantities"]  # type: ignore[assignment]
    tokens: list[str] = example["tokens"]  # type: ignore[assignment]
    figure = Figure(figsize=(13, 9), layout="constrained")
    axes = figure.subplots(len(values), 1, sharex=True)
    for panel, color, (name, of_tokens) in zip(axes, COLORS, values.items(), strict=False):
        shown = of_tokens[: len(tokens)]
        panel.bar(range(len(shown)), shown, color=color, width=0.85)
        for start, stop in example["slips"]:  # type: ignore[attr-defined]
            panel.axvspan(start - 0.5, stop - 0.5, color="#d62728", alpha=0.12, lw=0)
        panel.axhline(0, c="gray", lw=0.6)
        panel.set_title(name, loc="left", fontsize=9)
        panel.spines[["top", "right"]].set_visible(False)
    shown = [{"\n": "↵", "\\boxed{": "[", "}": "]"}.get(token, token) for token in tokens]
    axes[-1].set_xticks(range(len(shown)), shown, fontsize=8)
    figure.suptitle(f"{example['prompt']}   (the shaded line is the slip)")
    figure.savefig(file, dpi=110)


def report(results: Path, example: Path | None = None) -> None:
    """Write a table and a picture beside the results, and the picture of an example.

    Args:
        results: CSV of what each checkpoint's quantities found.
        example: JSON of one completion.
    """
    found = pd.read_csv(results)
    text = table(found)
    results.with_suffix(".md").write_text(text)
    draw(found, results.with_suffix(".png"))
    if example is not None:
        draw_example(json.loads(example.read_text()), example.with_suffix(".png"))
    print(text)
