"""What a group of a few completions maximises in expectation, by enumerating all groups.

test_gradient.py has the limit of large groups. `pytest -s` prints the relative errors.
"""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from enumerable import World, make_world
from prl_lightning.functional import (
    Aggregation,
    others_mean,
    outcome_advantages,
    policy_loss,
    process_term,
)

from .test_gradient import _print_the_test, relative_error  # noqa: F401

FINITE: dict[str, Callable[[Tensor, int], Tensor]] = {
    "rloo": lambda p, size: p,
    "dr_grpo": lambda p, size: (size - 1) / size * p,
    "maxrl": lambda p, size: -sum(((1 - p) ** k / k for k in range(1, size)), torch.zeros(())),
}


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("kind", FINITE)
def test_expected_gradient_of_a_finite_group(kind: str, size: int) -> None:
    """Over all groups of `size` completions, each with its probability.

    MaxRL (arXiv 2602.02710): the first terms of the series of log p.
    """
    world = make_world("binary", max_length=2)
    groups, share = all_groups(world, size)
    advantages = outcome_advantages(world.rewards[groups], size, kind)
    want = world.gradient(FINITE[kind](world.success, size))
    assert relative_error(expected_gradient(world, groups, share, advantages), want) < 1e-12


@pytest.mark.parametrize("size", [2, 3, 4])
def test_maxrl_lacks_the_last_term_without_wrong_groups(size: int) -> None:
    """With an advantage of -1 in groups that are wrong throughout it has the paper's order G."""
    world = make_world("binary", max_length=2)
    groups, share = all_groups(world, size)
    rewards = world.rewards[groups]
    wrong = (rewards.view(-1, size).sum(1) == 0).repeat_interleave(size)
    advantages = torch.where(wrong, -1.0, outcome_advantages(rewards, size, "maxrl"))
    got = expected_gradient(world, groups, share, advantages)
    want = world.gradient(FINITE["maxrl"](world.success, size + 1))
    assert relative_error(got, want) < 1e-12


@pytest.mark.parametrize(
    ("shape", "centred", "is_exact"),
    [
        ("plain", False, True),
        ("plain", True, True),
        ("shuffled", False, False),
        ("per_length", False, False),
        ("per_remaining", False, False),
    ],
)
@pytest.mark.parametrize("size", [2, 3])
def test_shapes_in_expectation(shape: str, centred: bool, is_exact: bool, size: int) -> None:
    """Over all groups: what the other completions say is no bias; another order or scale is one."""
    world = make_world(max_length=3)  # long enough for another order
    groups, share = all_groups(world, size)
    mask, log_ratios = world.mask[groups], world.log_ratios.detach()[groups]
    reg = process_term(log_ratios, mask, shape=shape)
    if centred:
        centres = [others_mean(*parts, size) for parts in zip(
            reg.split(size), mask.split(size), strict=True
        )]  # fmt: skip
        reg = reg - torch.cat(centres)
    got = expected_gradient(world, groups, share, reg)
    bias = relative_error(got, world.gradient(world.regulariser("reverse_kl")))
    assert bias < 1e-12 if is_exact else bias > 1e-2


def all_groups(world: World, size: int) -> tuple[Tensor, Tensor]:
    """The completions of all groups, one group after the other, and each group's probability."""
    count = len(world.rewards)
    groups = torch.tensor(list(itertools.product(range(count), repeat=size)))
    return groups.flatten(), world.probabilities.detach()[groups].prod(1)


def expected_gradient(world: World, groups: Tensor, share: Tensor, advantages: Tensor) -> Tensor:
    """Of the loss of one group; the shares of the groups weight their tokens."""
    policy, mask = world.logprobs(world.table)[groups], world.mask[groups]
    size = len(groups) // len(share)
    loss, _ = policy_loss(
        policy,
        policy.detach(),
        advantages,
        mask,
        aggregation=Aggregation("constant", num_sequences=size, max_length=1),
        token_weights=share.repeat_interleave(size)[:, None].expand_as(mask),
    )
    return -world.gradient(loss)
