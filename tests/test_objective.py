"""Every method of the papers, through Objective and the buffer, against loops over its formula."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from prl_lightning.data import RolloutBuffer, collate
from prl_lightning.functional import fixed_length_steps
from prl_lightning.objective import Objective
from prl_lightning.types import Completion, Prompt, Rollout

Rows = list[list[float]]
LENGTHS = [3, 1, 5, 2, 6, 4, 5, 2, 3, 1, 4, 6]
GROUP = 3
# Two groups with a signal, one where all are right and one where all are wrong.
REWARDS = [1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]
BETA, LIMIT = 0.3, 10
METHODS = {
    "grpo": Objective(kl="none"),
    "dr_grpo": Objective(kl="none", outcome="dr_grpo"),
    "rloo": Objective(kl="none", outcome="rloo"),
    "raft": Objective(kl="none", outcome="raft"),
    "kl_loss_k1": Objective(kl="loss", kl_estimator="k1", beta=BETA),
    "kl_loss_k2": Objective(kl="loss", kl_estimator="k2", beta=BETA),
    "kl_loss_k3": Objective(kl="loss", kl_estimator="k3", beta=BETA),
    "kl_loss_k3+": Objective(kl="loss", kl_estimator="k3+", beta=BETA),
    "kl_reward_trajectory": Objective(kl="reward_trajectory", beta=BETA),
    "kl_reward_step": Objective(kl="reward_step", beta=BETA),
    "prl": Objective(steps=2, beta=BETA, unbiased_std=True),
    "frpo": Objective(beta=BETA),
    "frpo_rollout": Objective(beta=BETA, log_ratio="rollout"),
    "frpo_k3": Objective(beta=BETA, divergence="reverse_k3"),
}
AGGREGATIONS = ["token_mean", "sequence_mean", "constant"]


@dataclass(frozen=True)
class Sampled:
    """Log-probabilities of one update's completions; multiples of 1/64, so float32 is exact."""

    policy: Rows
    old: Rows
    ref: Rows
    engine: Rows


def draw(off_policy: bool, seed: int = 0) -> Sampled:
    generator = torch.Generator().manual_seed(seed)

    def noise(scale: float) -> Rows:
        return [
            (scale * torch.randn(length, generator=generator).mul(64).round() / 64).tolist()
            for length in LENGTHS
        ]

    def plus(left: Rows, right: Rows) -> Rows:
        return [
            [a + b for a, b in zip(*rows, strict=True)] for rows in zip(left, right, strict=True)
        ]

    policy = [[-2.0 + value for value in row] for row in noise(0.5)]
    old = plus(policy, noise(0.5)) if off_policy else policy
    return Sampled(policy, old, plus(policy, noise(0.5)), plus(old, noise(0.5)))


# The formulas, as loops


def outcome_by_loop(objective: Objective, sampled: Sampled) -> Rows:
    """A_{i,t}, before any process term."""
    shift = {"reward_trajectory": objective.beta, "reward_step": objective.beta}
    beta = shift.get(objective.kl, 0.0)
    result = []
    for i, length in enumerate(LENGTHS):
        group = range(i // GROUP * GROUP, i // GROUP * GROUP + GROUP)
        row = []
        for t in range(length):
            first = t if objective.kl == "reward_step" else 0
            members = [j for j in group if objective.kl != "reward_step" or LENGTHS[j] > t]
            shaped = {
                j: REWARDS[j]
                - beta
                * sum(sampled.old[j][s] - sampled.ref[j][s] for s in range(first, LENGTHS[j]))
                for j in members
            }
            row.append(advantage_by_loop(objective, shaped, i))
        result.append(row)
    return result


def advantage_by_loop(objective: Objective, rewards: dict[int, float], i: int) -> float:
    values, count = list(rewards.values()), len(rewards)
    mean = sum(values) / count
    if max(values) == min(values):
        return 0.0
    if objective.outcome == "raft":
        return float(rewards[i] > 0)
    if objective.outcome == "dr_grpo":
        return rewards[i] - mean
    if objective.outcome == "rloo":
        return rewards[i] - (sum(values) - rewards[i]) / (count - 1)
    variance = sum((value - mean) ** 2 for value in values) / (count - objective.unbiased_std)
    return (rewards[i] - mean) / math.sqrt(variance)


def process_by_loop(objective: Objective, sampled: Sampled, i: int, t: int) -> float:
    """reg_{i,t} of METHOD: with steps, of the last token of t's step."""
    at = sampled.old if objective.log_ratio == "rollout" else sampled.policy
    delta = [a - b for a, b in zip(at[i], sampled.ref[i], strict=True)]
    if isinstance(objective.steps, int):
        t = min((t // objective.steps + 1) * objective.steps, LENGTHS[i]) - 1
    if objective.divergence == "reverse_k3":
        return delta[t] + sum(d + math.exp(-d) - 1 for d in delta[t + 1 :])
    return sum(delta[t:])


def penalty_by_loop(estimator: str, delta: float) -> tuple[float, float]:
    """D-hat and its derivative in log pi."""
    k3 = math.exp(-delta) - 1 + delta
    return {
        "k1": (delta, 1.0),
        "k2": (delta**2 / 2, delta),
        "k3": (k3, 1 - math.exp(-delta)),
        "k3+": (k3, delta),
    }[estimator]


def loss_by_loop(objective: Objective, sampled: Sampled) -> tuple[float, Rows]:
    """The loss of the whole update and its derivative in each log pi."""
    outcome = outcome_by_loop(objective, sampled)
    loss, gradient = 0.0, []
    for i, length in enumerate(LENGTHS):
        row = []
        for t in range(length):
            advantage = outcome[i][t]
            if objective.kl == "process":
                advantage -= objective.beta * process_by_loop(objective, sampled, i, t)
            ratio = math.exp(sampled.policy[i][t] - sampled.old[i][t])
            clipped = min(max(ratio, 1 - objective.clip_low), 1 + objective.clip_high)
            value = -min(ratio * advantage, clipped * advantage)
            slope = -ratio * advantage if ratio * advantage <= clipped * advantage else 0.0
            if objective.importance_cap is not None:
                mismatch = math.exp(sampled.old[i][t] - sampled.engine[i][t])
                value *= min(mismatch, objective.importance_cap)
                slope *= min(mismatch, objective.importance_cap)
            if objective.kl == "loss":
                delta = sampled.policy[i][t] - sampled.ref[i][t]
                term, its_slope = penalty_by_loop(objective.kl_estimator, delta)
                value += objective.beta * term
                slope += objective.beta * its_slope
            share = {
                "token_mean": 1 / sum(LENGTHS),
                "sequence_mean": 1 / (len(LENGTHS) * length),
                "constant": 1 / (len(LENGTHS) * LIMIT),
            }[objective.aggregation]
            loss += share * value
            row.append(share * slope)
        gradient.append(row)
    return loss, gradient


# The same through the package


def padded(rows: Rows) -> Tensor:
    tensors = [torch.tensor(row, dtype=torch.double) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)


def loss_of_package(
    objective: Objective, sampled: Sampled, micro_batches: int, off_policy: bool
) -> tuple[float, Rows]:
    """Sum of the micro-batches' losses, and their gradients brought back into the rows' order."""
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    advantages = objective.outcome_advantages(
        torch.tensor(REWARDS, dtype=torch.double),
        GROUP,
        padded(sampled.old) - padded(sampled.ref),
        mask,
    )
    rollouts = []
    for i, length in enumerate(LENGTHS):
        own = advantages[i] if advantages.ndim == 1 else advantages[i, :length]
        rollout = Rollout(
            Prompt([0] * (1 + i % 3), ""),
            Completion([0] * length, sampled.engine[i], finished=True),
            text=str(i),
            outcome_advantage=own,
            ref_logprobs=torch.tensor(sampled.ref[i], dtype=torch.double),
        )
        if off_policy:
            rollout.old_logprobs = torch.tensor(sampled.old[i], dtype=torch.double)
        rollouts.append(rollout)
    buffer = RolloutBuffer(1, micro_batches)
    buffer.fill(rollouts)
    total, gradient = 0.0, [[0.0]] * len(LENGTHS)
    for index, members in enumerate(buffer.micro_batch_rollouts):
        batch, rows = buffer[index], [int(rollout.text) for rollout in members]
        policy = padded([sampled.policy[i] for i in rows]).requires_grad_()
        ends = None
        if isinstance(objective.steps, int):
            ends = fixed_length_steps(batch.completion_mask, objective.steps)
        loss, _ = objective.loss(policy, batch.ref_logprobs, batch, ends)
        loss.backward()
        assert policy.grad is not None
        total += loss.item()
        for row, i in enumerate(rows):
            gradient[i] = policy.grad[row, : LENGTHS[i]].tolist()
    return total, gradient


@pytest.mark.parametrize("off_policy", [False, True], ids=["one update", "later update"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("method", METHODS)
def test_loss_and_gradient_are_the_formulas_however_the_update_is_cut(
    method: str, aggregation: str, off_policy: bool
) -> None:
    limit = LIMIT if aggregation == "constant" else None
    objective = replace(METHODS[method], aggregation=aggregation, max_length=limit)
    sampled = draw(off_policy)
    loss, gradient = loss_by_loop(objective, sampled)
    assert any(value for row in gradient for value in row)
    for micro_batches in (1, 2, 3, 4, 12):
        total, of_package = loss_of_package(objective, sampled, micro_batches, off_policy)
        assert total == pytest.approx(loss, rel=1e-9)
        for ours, expected in zip(of_package, gradient, strict=True):
            assert ours == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_the_data_of_the_formulas_reaches_every_branch() -> None:
    """Both bounds clip, the cap cuts and does not, and rollout differs from current."""
    sampled = draw(off_policy=True)
    pairs = [
        (math.exp(a - b), math.exp(b - c))
        for rows in zip(sampled.policy, sampled.old, sampled.engine, strict=True)
        for a, b, c in zip(*rows, strict=True)
    ]
    assert (
        {ratio < 0.8 for ratio, _ in pairs} == {ratio > 1.2 for ratio, _ in pairs} == {True, False}
    )
    assert {mismatch > 1.1 for _, mismatch in pairs} == {True, False}
    current, rollout = (
        loss_by_loop(METHODS[name], sampled)[0] for name in ("frpo", "frpo_rollout")
    )
    assert abs(current - rollout) > 1e-3


@pytest.mark.parametrize("off_policy", [False, True], ids=["one update", "later update"])
@pytest.mark.parametrize("method", ["grpo", "frpo", "kl_loss_k3"])
def test_importance_weights_are_capped_and_leave_the_kl_alone(
    method: str, off_policy: bool
) -> None:
    objective = replace(METHODS[method], importance_cap=1.1)
    sampled = draw(off_policy)
    loss, gradient = loss_by_loop(objective, sampled)
    total, of_package = loss_of_package(objective, sampled, 2, off_policy)
    assert total == pytest.approx(loss, rel=1e-9)
    assert of_package == [pytest.approx(row, rel=1e-9, abs=1e-12) for row in gradient]
    assert abs(loss - loss_by_loop(METHODS[method], sampled)[0]) > 1e-4


def test_asymmetric_bounds_are_passed_on() -> None:
    objective = replace(METHODS["frpo"], clip_low=0.1, clip_high=0.5)
    sampled = draw(off_policy=True)
    loss, _ = loss_by_loop(objective, sampled)
    assert loss_of_package(objective, sampled, 1, off_policy=True)[0] == pytest.approx(loss)
    assert abs(loss - loss_by_loop(METHODS["frpo"], sampled)[0]) > 1e-4


def test_the_process_term_is_reported_in_the_unit_of_the_advantage() -> None:
    sampled, objective = draw(off_policy=False), METHODS["frpo"]
    rollouts = [
        Rollout(
            Prompt([0], ""),
            Completion([0] * length, sampled.engine[i], finished=True),
            text="",
            outcome_advantage=torch.tensor(float(i)),
            ref_logprobs=torch.tensor(sampled.ref[i]),
        )
        for i, length in enumerate(LENGTHS)
    ]
    batch = collate(rollouts, sum(LENGTHS), len(LENGTHS))
    policy = padded(sampled.policy).requires_grad_()
    _, stats = objective.loss(policy, batch.ref_logprobs, batch, None)
    for i, length in enumerate(LENGTHS):
        for t in range(length):
            expected = BETA * process_by_loop(objective, sampled, i, t)
            assert stats["process_term"][i, t].item() == pytest.approx(expected, abs=1e-5)
            assert stats["advantage"][i, t].item() == pytest.approx(i - expected, abs=1e-5)
    assert not stats["process_term"].requires_grad


# The baseline of the k3 divergences


def test_the_baseline_is_what_later_tokens_cost_on_average() -> None:
    objective = Objective(beta=BETA, divergence="reverse_k3", baseline=True)
    sampled = draw(off_policy=False)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    advantages = objective.outcome_advantages(
        torch.tensor(REWARDS, dtype=torch.double),
        GROUP,
        padded(sampled.old) - padded(sampled.ref),
        mask,
        mean_kl=torch.tensor(0.25, dtype=torch.double),
    )
    outcome = outcome_by_loop(objective, sampled)
    for i, length in enumerate(LENGTHS):
        for t in range(length):
            expected = outcome[i][t] + BETA * (length - 1 - t) * 0.25
            assert advantages[i, t].item() == pytest.approx(expected, rel=1e-9)


# What needs what


@pytest.mark.parametrize(
    ("objective", "needs_reference", "needs_log_ratios"),
    [
        (Objective(), True, False),
        (Objective(beta=0.0), False, False),
        (Objective(kl="none"), False, False),
        (Objective(kl="loss"), True, False),
        (Objective(kl="reward_step"), True, True),
        (Objective(kl="reward_trajectory"), True, True),
        (Objective(kl="reward_step", beta=0.0), False, False),
        (Objective(baseline=True, divergence="reverse_k3"), True, True),
        (Objective(baseline=True, divergence="forward_k3", beta=0.0), False, False),
    ],
)
def test_what_an_objective_needs(
    objective: Objective, needs_reference: bool, needs_log_ratios: bool
) -> None:
    assert objective.needs_reference == needs_reference
    assert objective.needs_log_ratios == needs_log_ratios


def test_kl_in_the_reward_without_log_ratios_is_an_error() -> None:
    with pytest.raises(ValueError, match="need log_ratios and completion_mask"):
        METHODS["kl_reward_step"].outcome_advantages(torch.tensor(REWARDS), GROUP)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": -0.1}, r"model\.objective\.beta=-0\.1: must be 0 or a positive number"),
        ({"beta": float("nan")}, r"objective\.beta=nan: must be 0 or a positive number"),
        ({"clip_low": -0.1}, r"clip_low=-0\.1: .*clip_low between 0 and 1"),
        ({"clip_low": 2.0}, r"clip_low=2\.0: .*clip_low between 0 and 1"),
        ({"clip_high": -0.1}, r"clip_high=-0\.1: .*not below 0"),
        ({"kl": "loss", "steps": 256}, r"steps=256 has no effect with kl='loss'.*'process'"),
        ({"kl": "none", "steps": "newline"}, r"steps='newline' has no effect with kl='none'"),
        ({"kl": "none", "baseline": True}, r"baseline is that of kl='process'.* kl='none'"),
        (
            {"baseline": True, "divergence": "reverse_k3", "steps": 4},
            r"baseline is that of .*steps='token'.* steps=4",
        ),
        ({"baseline": True, "divergence": "forward_kl"}, r"baseline is .*not of .*'forward_kl'"),
        ({"outcome": "raft", "kl": "reward_step"}, r"outcome='raft' asks whether .*'reward_step'"),
        ({"aggregation": "constant"}, r"max_length goes with aggregation='constant'"),
        ({"max_length": 100}, r"aggregation='token_mean', max_length=100"),
        ({"kl": "proces"}, r"objective\.kl='proces': use one of .*'process'"),
        ({"outcome": "ppo"}, r"objective\.outcome='ppo': use one of .*'grpo'"),
        ({"importance_cap": 0.0}, r"importance_cap=0\.0: must be above 0, or null"),
    ],
)
def test_contradictions_are_errors(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Objective(**settings)  # type: ignore[arg-type]
