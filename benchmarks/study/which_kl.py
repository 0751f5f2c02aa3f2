"""Bias and noise of each place for the KL, on a policy small enough to enumerate.

    python benchmarks/study/which_kl.py      # writes which_kl.md beside it, and docs/which_kl.png

The objective is ℓ(E r) - β KL(π‖π_ref), with rewards of 0 and 1 and ℓ = 2·arcsin√, which group mean
and deviation imply. Bias is the relative error of the expected gradient. Noise is the standard
deviation of one completion's gradient, relative to the norm of the exact gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from enumerable import BETA, GROUP, World, make_world
from prl_lightning.functional import (
    kl_in_reward_step,
    kl_in_reward_trajectory,
    outcome_advantages,
    process_term,
)
from prl_lightning.runs.text import markdown_table

ROOT = Path(__file__).parents[2]
Weights = Callable[[World, Tensor, Tensor, Tensor], Tensor]  # of ∇ log π_t, for a whole group


def in_process(**options: object) -> Weights:
    def weights(world: World, rewards: Tensor, delta: Tensor, mask: Tensor) -> Tensor:
        outcome = outcome_advantages(rewards, GROUP, "grpo")[:, None]
        return outcome - BETA * process_term(delta, mask, **options)

    return weights


def in_loss(slope: Callable[[Tensor], Tensor]) -> Weights:
    """A KL estimate per token in the loss has the gradient of its slope times ∇ log π."""

    def weights(world: World, rewards: Tensor, delta: Tensor, mask: Tensor) -> Tensor:
        return outcome_advantages(rewards, GROUP, "grpo")[:, None] - BETA * slope(delta) * mask

    return weights


def in_trajectory(world: World, rewards: Tensor, delta: Tensor, mask: Tensor) -> Tensor:
    shaped = kl_in_reward_trajectory(rewards, delta, mask, BETA)
    return outcome_advantages(shaped, GROUP, "grpo")[:, None].expand_as(delta)


def in_steps(world: World, rewards: Tensor, delta: Tensor, mask: Tensor) -> Tensor:
    shaped = kl_in_reward_step(rewards, delta, mask, BETA)
    return outcome_advantages(shaped, GROUP, "grpo", mask)


PLACES: dict[str, Weights] = {
    "process term (PRL, FRPO)": in_process(),
    "process term, discount 0.9": in_process(discount=0.9),
    "process term, discount 0 = loss, k2": in_process(discount=0.0),
    "process term, shuffled": in_process(shape="shuffled"),
    "process term, divided by T": in_process(shape="per_length"),
    "loss, k1": in_loss(torch.ones_like),
    "loss, k3": in_loss(lambda delta: 1 - (-delta).exp()),
    "reward of the completion": in_trajectory,
    "reward of each step": in_steps,
}


def bias_and_noise(world: World, weights: Tensor) -> tuple[float, float]:
    want = world.gradient(world.objective("reverse_kl", "arcsin"))
    policy, mask = world.group(world.logprobs(world.table)), world.group(world.mask)
    weighted = (weights.detach() * policy * mask).sum(-1)  # the gradient of each completion
    own = torch.stack([
        torch.autograd.grad(one, world.table, retain_graph=True)[0].flatten() for one in weighted
    ])  # fmt: skip
    size = want.norm()
    noise = (own - own.mean(0)).square().sum(1).mean().sqrt()
    return float((own.mean(0).view_as(want) - want).norm() / size), float(noise / size)


def main() -> None:
    world = make_world("binary")
    rewards, delta, mask = world.in_group()
    found = {
        name: bias_and_noise(world, weights(world, rewards, delta, mask))
        for name, weights in PLACES.items()
    }
    rows = [[name, f"{bias:.0e}", f"{noise:.1f}"] for name, (bias, noise) in found.items()]
    table = markdown_table(["place of the KL", "bias", "noise"], rows)
    Path(__file__).with_suffix(".md").write_text(f"{table}\n")
    print(table)
    draw(found, ROOT / "docs" / "which_kl.png")


def draw(found: dict[str, tuple[float, float]], out: Path) -> None:
    figure, axis = plt.subplots(figsize=(8.5, 3.8), layout="constrained")
    names = list(found)[::-1]
    biases = [max(found[name][0], 1e-16) for name in names]
    bars = axis.barh(names, biases, color="tab:orange")
    for bar, name, bias in zip(bars, names, biases, strict=True):
        bar.set_color("tab:blue" if bias < 1e-9 else "tab:orange")
        axis.annotate(f" {found[name][0]:.0e}", (bias, bar.get_y() + 0.2))
    axis.set_xscale("log")
    axis.set_xlim(1e-16, 100)
    axis.set_xlabel("relative error of the expected gradient")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main()
