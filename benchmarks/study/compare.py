"""The study's table, with intervals over seeds, and its pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import t as student
from scipy.stats import ttest_1samp

from prl_lightning.runs.text import markdown_table

VARIANT = ["method", "beta", "steps"]
SAME = ["mean@16", "pass@16", "pass@64", "maj@16"]
MEASURES = [*SAME, *(f"longer_{name}" for name in SAME), "entropy", "kl_ref"]
PAIRED = ["mean@16", "pass@16", "longer_mean@16", "longer_pass@16"]
CURVES = {
    "reward": "reward of the sampled completions",
    "entropy": "entropy, a token",
    "kl_ref": "KL to the reference, a token",
    "completion_length": "tokens of a completion",
}
COLORS = list(matplotlib.colormaps["tab20"].colors[::2]) + ["black", "#ffb000", "#606060"]


def half_width(values: pd.Series[float]) -> float:
    """Half of the 95% interval of a mean over seeds; NaN for one seed or none."""
    freedom = len(values) - 1
    if freedom < 1:
        return float("nan")
    return float(student.ppf(0.975, freedom)) * float(values.std(ddof=1)) / len(values) ** 0.5


def read_results(file: Path) -> pd.DataFrame:
    """The rows; steps are "" where a method has none."""
    return pd.read_csv(file, dtype={"steps": str}).fillna({"steps": ""})


def in_order(runs: pd.DataFrame, methods: Iterable[str]) -> pd.DataFrame:
    """Rows by method. In a file they are in the order in which runs ended."""
    return pd.concat([runs[runs.method == method] for method in methods])


def difference(results: pd.DataFrame, measure: str) -> pd.DataFrame:
    """Each run minus GRPO of its seed, as mean and half width over seeds."""
    grpo = results[results.method == "grpo"].set_index("seed")[measure]
    trained = results[~results.method.isin(["base", "grpo"])]
    paired = trained.assign(difference=trained[measure] - trained.seed.map(grpo))
    by_variant = paired.dropna(subset=["difference"]).groupby(VARIANT, sort=False).difference
    return by_variant.agg(["mean", half_width])


def table(results: pd.DataFrame) -> str:
    """Markdown: means over seeds with their intervals, and differences to GRPO."""
    differences = {measure: difference(results, measure) for measure in PAIRED}
    heads = [*VARIANT, "seeds", *MEASURES, *(f"{measure} - GRPO" for measure in PAIRED)]
    lines = []
    for variant, rows in results.groupby(VARIANT, sort=False):
        cells = [str(value) for value in variant] + [str(len(rows))]
        if variant[0] == "base":  # its rows are of base models, not of seeds
            rows = rows.mean(numeric_only=True).to_frame().T
        cells += [over_seeds(rows[name]) for name in MEASURES]
        for measure in PAIRED:
            known = differences[measure]
            is_known = variant in known.index
            cells.append(interval(*known.loc[variant], sign="+") if is_known else "")
        lines.append(cells)
    return markdown_table(heads, lines) + "\n"


def frpo_less(results: pd.DataFrame, method: str) -> str:
    """Markdown rows: FRPO less another method, paired by seed, at each beta that both have run at.

    Where there are several, also of each seed's mean over them, in which no beta is chosen; of the
    seeds that ran at all of them.
    """
    measures = [*SAME, "entropy", "kl_ref"]
    frpo, other = (
        results[results.method == name].set_index(["beta", "seed"])[measures]
        for name in ("frpo", method)
    )
    paired = (frpo - other).dropna()
    rows = [(str(beta), rows) for beta, rows in paired.groupby("beta")]
    if len(rows) > 1:
        by_seed = paired.groupby("seed")
        rows.append(("all", by_seed.mean()[by_seed.size() == len(rows)]))
    lines = [[method, beta, *(over_seeds(d[m], "+") for m in measures)] for beta, d in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def frpo_table(results: pd.DataFrame) -> str:
    """FRPO less every other method with a beta and without steps."""
    heads = ["FRPO less", "beta", *SAME, "entropy", "kl_ref"]
    others = results[(results.beta > 0) & (results.steps == "") & (results.method != "frpo")]
    return f"{markdown_table(heads, [])}\n" + "".join(
        frpo_less(results, method) for method in others.method.unique()
    )


def interval(mean: float, half: float, sign: str = "") -> str:
    """For example "0.412 ± 0.021"; no interval where one seed ran, nothing where none did."""
    if pd.isna(mean):
        return ""
    return f"{mean:{sign}.3f}" + ("" if pd.isna(half) else f" ± {half:.3f}")


def over_seeds(values: pd.Series[float], sign: str = "") -> str:
    """The mean of values with its interval."""
    return interval(values.mean(), half_width(values), sign)


def seeds_to_see(differences: pd.Series[float], effect: float = 0.03, power: float = 0.8) -> int:
    """Seeds at which an effect would be significant (0.05, two-sided) with a probability.

    Args:
        differences: of the seeds that ran; their spread is taken for that of all.
        effect: a mean difference.
        power: the probability.
    """
    spread, seeds = float(differences.std(ddof=1)), 2
    while sum(student.ppf((0.975, power), seeds - 1)) * spread > effect * seeds**0.5:
        seeds += 1
    return seeds


def holm(values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979), in the order given."""
    corrected, least = [0.0] * len(values), 0.0
    for rank, place in enumerate(sorted(range(len(values)), key=lambda i: values[i])):
        least = max(least, min(1.0, values[place] * (len(values) - rank)))
        corrected[place] = least
    return corrected


def pairs(runs: pd.DataFrame, measures: Sequence[str]) -> str:
    """Markdown: each method less each later one, paired by seed, with p-values by Holm.

    A measure's p-values are corrected for the number of pairs.
    """
    by_seed = {
        method: rows.set_index("seed") for method, rows in runs.groupby("method", sort=False)
    }
    both = list(combinations(by_seed, 2))
    cells = []
    for measure in measures:
        less = [(by_seed[a][measure] - by_seed[b][measure]).dropna() for a, b in both]
        chances = holm([float(ttest_1samp(values, 0).pvalue) for values in less])
        cells.append(
            [f"{over_seeds(v, '+')}, p {p:.2f}" for v, p in zip(less, chances, strict=True)]
        )
    heads = ["difference", *measures]
    lines = [[f"{a} - {b}", *found] for (a, b), *found in zip(both, *cells, strict=True)]
    return markdown_table(heads, lines) + "\n"


def draw_against_drift(panels: Mapping[str, tuple[pd.DataFrame, str]], file: Path) -> None:
    """A measure against the distance: a dot for each run, a diamond for each method's mean.

    Args:
        panels: by title, the runs, a row each, and the measure's column.
        file: where to.
    """
    figure = Figure(figsize=(2.5 + 3.8 * len(panels), 4.2), layout="constrained")
    axes = figure.subplots(1, len(panels))
    for panel, (title, (runs, measure)) in zip(axes, panels.items(), strict=True):
        trained = runs[runs.method != "base"]
        for color, (method, rows) in zip(
            COLORS, trained.groupby("method", sort=False), strict=False
        ):
            panel.scatter(rows.kl_ref, rows[measure], s=9, alpha=0.5, color=color)
            mean = rows[["kl_ref", measure]].mean()
            panel.scatter(*mean, s=70, color=color, label=method, marker="D")
        panel.set(title=title, xlabel="KL to the reference, nats a token", ylabel=measure)
        plain(panel)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right")
    figure.savefig(file, dpi=110)


def plain(panel: Axes) -> None:
    """A light grid, and no frame."""
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)


def draw(curves: pd.DataFrame, file: Path, beta: float) -> None:
    """Means over seeds of every method, those with a KL at one beta."""
    shown = curves[(curves.beta == beta) | (curves.beta == 0)]
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    axes: list[Axes] = list(figure.subplots(2, 2).flat)
    for panel in axes:
        panel.set_prop_cycle(color=COLORS)
    for (measure, title), panel in zip(CURVES.items(), axes, strict=True):
        for (method, _, steps), rows in shown.groupby(VARIANT, sort=False):
            label = f"{method} {steps}" if steps.isdigit() else method
            panel.plot(rows.groupby("iteration")[measure].mean(), label=label, lw=1.4)
        panel.set(title=title, xlabel="iteration")
        plain(panel)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    figure.suptitle(f"beta = {beta}")
    figure.savefig(file, dpi=110)


def draw_betas(results: pd.DataFrame, file: Path) -> None:
    """What each method reaches at each beta: means, with a dot for every seed."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    swept, fixed = results[results.beta > 0], results[results.beta == 0]
    for measure, panel in zip(("mean@16", "pass@16", "kl_ref"), figure.subplots(1, 3), strict=True):
        for rank, ((method, steps), rows) in enumerate(swept.groupby(["method", "steps"])):
            place = rows.beta * 1.04 ** (rank - 4)  # beside each other where beta is the same
            style = {"marker": "o", "color": COLORS[rank]}
            panel.plot(place, rows[measure], ls="", ms=2.5, alpha=0.5, **style)
            means = rows.groupby(place)[measure].mean()
            label = f"{method} {steps}" if steps.isdigit() else method
            panel.plot(means.index, means, ms=5, lw=1.2, label=label, **style)
        for method, style in (("grpo", "--"), ("raft", ":"), ("base", "-.")):
            panel.axhline(
                fixed[fixed.method == method][measure].mean(), c="gray", ls=style, label=method
            )
        panel.set(title=measure, xlabel="beta", xscale="log")
        panel.set_ylim(bottom=0.0, top=None if measure == "kl_ref" else 1.0)
        plain(panel)
    figure.legend(*panel.get_legend_handles_labels(), loc="outside right")
    figure.savefig(file, dpi=110)


def report(results: Path, curves: Path, folder: Path) -> None:
    """Write table.md, curves-<beta>.png and betas.png.

    Args:
        results: CSV of the runs.
        curves: CSV of their iterations.
        folder: where to.
    """
    runs = read_results(results)
    text = f"{table(runs)}\n{frpo_table(runs)}"
    (folder / "table.md").write_text(text)
    iterations = read_results(curves)
    # A run that was broken off between its curves and its row has them twice.
    iterations = iterations.drop_duplicates([*VARIANT, "seed", "iteration"], keep="last")
    for beta in sorted(set(runs.beta) - {0.0}):
        draw(iterations, folder / f"curves-{beta}.png", beta)
    draw_betas(runs, folder / "betas.png")
    print(text)
