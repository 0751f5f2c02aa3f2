"""Draw a run's reward, evaluation, KL and length, such as README's picture of the demo.

python benchmarks/draw_run.py runs/smollm2/version_0 docs/demo.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from prl_lightning.runs.files import EVALUATIONS, METRICS, read_evaluations, read_metrics

CURVES = {
    "rollout/reward": "reward of the sampled completions",
    "train/kl_ref": "KL to the reference, a token",
    "rollout/calls": "calls an episode",
    "rollout/completion_length": "tokens a completion",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.2), layout="constrained")
    curves = read_metrics(args.run / METRICS)
    known = [name for name in CURVES if name in curves]
    for axis, name in zip(axes.flat[[0, 2, 3]], known, strict=False):
        axis.plot(*curves[name])
        axis.set_title(CURVES[name])
    draw_evaluations(axes[0, 1], read_evaluations(args.run / EVALUATIONS)[0])
    for axis in axes.flat:
        axis.set_xlabel("updates")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(args.out, dpi=110)


def draw_evaluations(axis: plt.Axes, evaluations: list[dict]) -> None:
    """Draw each set's metrics with their intervals."""
    steps = [evaluation["step"] for evaluation in evaluations]
    for name, results in evaluations[0]["sets"].items():
        for metric in (metric for metric in results["metrics"] if "@" in metric):
            points = [evaluation["sets"][name]["metrics"][metric] for evaluation in evaluations]
            means, lows, highs = zip(*points, strict=True)
            (line,) = axis.plot(steps, means, marker="o", label=f"{name} {metric}")
            axis.fill_between(steps, lows, highs, alpha=0.15, color=line.get_color())
    axis.set_title("evaluation, 95% intervals over problems")
    axis.set_ylim(0, 1.02)
    axis.legend(frameon=False)


if __name__ == "__main__":
    main()
