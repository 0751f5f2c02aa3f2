"""Credit across turns: a policy acts, an environment answers, the policy acts again.

All episodes are enumerated. The environment's tokens are a hole in the completion: the objective
E r - β E Σ_t f(u_t), differentiated by autograd, knows nothing of them.
"""

from __future__ import annotations

import pytest
import torch

from enumerable import BETA, CUSTOM, GENERATORS, GROUP, World
from functional.test_gradient import relative_error
from prl_lightning.functional import outcome_advantages, prl_advantages

# By first action: how many tokens the environment answers. After action 2 the episode is over.
ANSWERS = {0: 1, 1: 3}
LONGEST = 1 + 3 + 2
GARBAGE = 50.0  # log-ratio of the environment's tokens, which nothing may read


def make_world() -> World:
    """First an action of three; then, unless it was the last, two tokens of three."""
    episodes = [(0, b, c) for b in range(3) for c in range(3)]
    episodes += [(1, b, c) for b in range(3) for c in range(3)]
    episodes += [(2,)]
    states, ids = (torch.zeros(len(episodes), LONGEST, dtype=torch.long) for _ in range(2))
    mask = torch.zeros(len(episodes), LONGEST, dtype=torch.bool)
    prefixes = [(), (0,), (1,), *[(a, b) for a in (0, 1) for b in range(3)]]
    for row, episode in enumerate(episodes):
        for turn, token in enumerate(episode):
            place = turn + (ANSWERS[episode[0]] if turn else 0)
            states[row, place], ids[row, place] = prefixes.index(episode[:turn]), token
            mask[row, place] = True
    orders = [(0.5, 0.25, 0.25), (0.25, 0.5, 0.25), (0.25, 0.25, 0.5)]
    table = torch.tensor([orders[state % 3] for state in range(len(prefixes))]).double().log()
    generator = torch.Generator().manual_seed(3)
    ref_table, rewards = (
        torch.randn(size, generator=generator, dtype=torch.float64)
        for size in (table.shape, len(episodes))
    )
    return World(table.requires_grad_(), ref_table, rewards, states, ids, mask)


def test_the_world_is_complete_and_has_holes() -> None:
    world = make_world()
    assert world.probabilities.sum().item() == pytest.approx(1, abs=1e-12)
    assert world.mask[0].tolist() == [True, False, True, True, False, False]
    assert world.mask[9].tolist() == [True, False, False, False, True, True]
    assert world.mask[18].tolist() == [True] + [False] * 5


@pytest.mark.parametrize("divergence", sorted(GENERATORS.keys() - CUSTOM.keys()))
def test_credit_across_a_turn_is_autograds(divergence: str) -> None:
    world = make_world()
    rewards, log_ratios, mask = world.in_group()
    log_ratios = torch.where(mask, log_ratios, GARBAGE)
    outcome = outcome_advantages(rewards, GROUP, "dr_grpo")
    advantages = prl_advantages(outcome, log_ratios, mask, BETA, divergence)
    want = world.gradient(world.objective(divergence, "linear"))
    assert relative_error(world.surrogate_gradient(advantages), want) < 1e-12


def test_the_first_action_pays_for_the_turns_after_the_answer() -> None:
    """Without the terms beyond the hole, the gradient at the first action is another one."""
    world = make_world()
    rewards, log_ratios, mask = world.in_group()
    outcome = outcome_advantages(rewards, GROUP, "dr_grpo")
    is_first_turn = torch.arange(LONGEST) == 0
    blind = prl_advantages(outcome, log_ratios, mask & is_first_turn, BETA)
    seeing = prl_advantages(outcome, log_ratios, mask, BETA)
    want = world.gradient(world.objective("reverse_kl", "linear"))[0]
    got = world.surrogate_gradient(torch.where(is_first_turn, blind, seeing))[0]
    assert relative_error(got, want) > 0.1
