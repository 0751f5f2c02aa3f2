"""Every method of the papers, through Objective and the buffer, against loops over its formula."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from prl_lightning.data import RolloutBuffer, collate
from prl_lightning.functional import (
    EngineCorrection,
    fixed_length_steps,
    register_advantage,
    register_loss,
)
from prl_lightning.functional.advantages import ADVANTAGES
from prl_lightning.functional.losses import LOSSES
from prl_lightning.objective import Objective
from prl_lightning.types import Completion, Prompt, Rollout

Rows = list[list[float]]
LENGTHS = [3, 1, 5, 2, 6, 4, 5, 2, 3, 1, 4, 6]
GROUP = 3
# Two groups with a signal, one where all are right and one where all are wrong.
REWARDS = [1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]
BETA, LIMIT = 0.3, 10
CAP = EngineCorrection(high=1.1)
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
    "kl_reward_step": Objective(kl="reward_step", beta=BETA, unbiased_std=True),
    "prl": Objective(steps=2, beta=BETA, unbiased_std=True),
    "frpo": Objective(beta=BETA),
    "frpo_rollout": Objective(beta=BETA, log_ratio="rollout"),
    "frpo_k3": Objective(beta=BETA, divergence="reverse_k3"),
    "frpo_bounds": Objective(beta=BETA, clip_low=0.1, clip_high=0.5),
    # The weight between engine and trainer leaves the KL loss alone.
    "grpo_capped": Objective(kl="none", engine_correction=CAP),
    "frpo_capped": Objective(beta=BETA, engine_correction=CAP),
    "kl_loss_capped": Objective(kl="loss", beta=BETA, engine_correction=CAP),
}
AGGREGATIONS = ["token_mean", "sequence_mean", "constant"]


@dataclass(frozen=True)
class Sampled:
    """Log-probabilities of one update's completions; multiples of 1/64, so float32 is exact."""

    policy: Rows
    old: Rows
    ref: Rows
    engine: Rows


def draw(off_policy: bool) -> Sampled:
    generator = torch.Generator().manual_seed(0)

    def noisy(rows: Rows) -> Rows:
        noise = [torch.randn(len(row), generator=generator).mul(32).round() / 64 for row in rows]
        return [(torch.tensor(row) + own).tolist() for row, own in zip(rows, noise, strict=True)]

    policy = noisy([[-2.0] * length for length in LENGTHS])
    old = noisy(policy) if off_policy else policy
    return Sampled(policy, old, noisy(policy), noisy(old))


# The formulas, as loops


def outcome_by_loop(objective: Objective, sampled: Sampled, i: int, t: int) -> float:
    """A_{i,t}, before any process term."""
    per_step = objective.kl == "reward_step"
    beta = objective.beta if objective.kl.startswith("reward") else 0.0
    rewards = {}
    for j in range(i // GROUP * GROUP, i // GROUP * GROUP + GROUP):
        pairs = list(zip(sampled.old[j], sampled.ref[j], strict=True))[t if per_step else 0 :]
        if LENGTHS[j] > t or not per_step:
            rewards[j] = REWARDS[j] - beta * sum(old - ref for old, ref in pairs)
    return advantage_by_loop(objective, rewards, i)


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
    loss, gradient = 0.0, []
    for i, length in enumerate(LENGTHS):
        row = []
        for t in range(length):
            advantage = outcome_by_loop(objective, sampled, i, t)
            if objective.kl == "process":
                advantage -= objective.beta * process_by_loop(objective, sampled, i, t)
            ratio = math.exp(sampled.policy[i][t] - sampled.old[i][t])
            clipped = min(max(ratio, 1 - objective.clip_low), 1 + objective.clip_high)
            value = -min(ratio * advantage, clipped * advantage)
            slope = -ratio * advantage if ratio * advantage <= clipped * advantage else 0.0
            if objective.engine_correction is not None:
                mismatch = math.exp(sampled.old[i][t] - sampled.engine[i][t])
                weight = min(mismatch, objective.engine_correction.high)
                value, slope = weight * value, weight * slope
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


MASK = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]


def advantages_of_package(
    objective: Objective, sampled: Sampled, mean_kl: Tensor | None = None
) -> Tensor:
    rewards, log_ratios = torch.tensor(REWARDS).double(), padded(sampled.old) - padded(sampled.ref)
    return objective.outcome_advantages(rewards, GROUP, log_ratios[..., None], MASK, mean_kl)


def rollouts_of(objective: Objective, sampled: Sampled, off_policy: bool) -> list[Rollout]:
    """Their texts are their indices."""
    advantages = advantages_of_package(objective, sampled)
    return [
        Rollout(
            Prompt([0] * (1 + i % 3), ""),
            Completion([0] * length, sampled.engine[i], finished=True),
            text=str(i),
            outcome_advantage=advantages[i] if advantages.ndim == 1 else advantages[i, :length],
            old_logprobs=torch.tensor(sampled.old[i], dtype=torch.double) if off_policy else None,
            ref_logprobs=torch.tensor(sampled.ref[i], dtype=torch.double)[:, None],
        )
        for i, length in enumerate(LENGTHS)
    ]


def loss_of_package(
    objective: Objective, sampled: Sampled, micro_batches: int, off_policy: bool
) -> tuple[float, Rows]:
    """Sum of the micro-batches' losses, and their gradients in the order of the rows."""
    buffer = RolloutBuffer(1, micro_batches)
    buffer.fill(rollouts_of(objective, sampled, off_policy))
    total, gradient = 0.0, [[0.0]] * len(LENGTHS)
    for index, members in enumerate(buffer.micro_batch_rollouts):
        batch, rows = buffer[index], [int(rollout.text) for rollout in members]
        policy = padded([sampled.policy[i] for i in rows]).requires_grad_()
        ends = None
        if isinstance(objective.steps, int):
            ends = fixed_length_steps(batch.completion_mask, objective.steps)
        loss, _ = objective.loss(policy, batch.ref_logprobs, batch, ends)
        (slopes,) = torch.autograd.grad(loss, policy)
        total += loss.item()
        for i, row in zip(rows, slopes.tolist(), strict=True):
            gradient[i] = row[: LENGTHS[i]]
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
    for micro_batches in (1, 2, 3, 4, 12):
        total, of_package = loss_of_package(objective, sampled, micro_batches, off_policy)
        assert total == pytest.approx(loss, rel=1e-9)
        assert of_package == [pytest.approx(row, rel=1e-9, abs=1e-12) for row in gradient]


def test_the_data_of_the_formulas_tells_the_methods_apart() -> None:
    """Both bounds clip. Only k3+ is like others: it has the loss of k3 and the slope of k2."""
    sampled = draw(off_policy=True)
    found = [loss_by_loop(objective, sampled) for objective in METHODS.values()]
    assert len({f"{loss:.4f}" for loss, _ in found}) == len(METHODS) - 1
    assert len({str(gradient) for _, gradient in found}) == len(METHODS) - 1
    deltas = padded(sampled.policy) - padded(sampled.old)
    assert deltas.min() < math.log(0.8) < math.log(1.5) < deltas.max()


def test_the_process_term_is_reported_in_the_unit_of_the_advantage() -> None:
    sampled, objective = draw(off_policy=False), METHODS["frpo"]
    batch = collate(rollouts_of(objective, sampled, off_policy=False), sum(LENGTHS), len(LENGTHS))
    policy = padded(sampled.policy).requires_grad_()
    _, stats = objective.loss(policy, batch.ref_logprobs, batch, None)
    for i, length in enumerate(LENGTHS):
        for t in range(length):
            term = BETA * process_by_loop(objective, sampled, i, t)
            advantage = outcome_by_loop(objective, sampled, i, t) - term
            assert stats["process_term"][i, t].item() == pytest.approx(term, abs=1e-12)
            assert stats["advantage"][i, t].item() == pytest.approx(advantage, abs=1e-12)
    assert not stats["process_term"].requires_grad


def test_the_share_of_corrected_tokens_is_reported() -> None:
    """By hand: log w is 0 or 1 for every other token, and exp(1) is above the bound of 2."""
    rollout = Rollout(Prompt([0], ""), Completion([0] * 4, [-2.0, -3.0] * 2, True), "")
    policy = torch.full((1, 4), -2.0, requires_grad=True)
    batch = collate([rollout], 4, 1)
    batch.outcome_advantages = torch.ones(1)
    for correction, loss in (
        (EngineCorrection(), -(1 + 2) / 2),
        (EngineCorrection(outside="mask"), -1 / 2),
    ):
        objective = Objective(kl="none", engine_correction=correction)
        got, stats = objective.loss(policy, None, batch, None)
        assert got.item() == pytest.approx(loss)
        assert stats["engine_corrected"].tolist() == [[0, 1, 0, 1]]


# The baseline of the k3 divergences


def test_the_baseline_is_what_later_tokens_cost_on_average() -> None:
    objective = Objective(beta=BETA, divergence="reverse_k3", baseline=True)
    sampled = draw(off_policy=False)
    advantages = advantages_of_package(objective, sampled, torch.tensor(0.25).double())
    for i, length in enumerate(LENGTHS):
        for t in range(length):
            outcome = outcome_by_loop(objective, sampled, i, t)
            expected = outcome + BETA * (length - 1 - t) * 0.25
            assert advantages[i, t].item() == pytest.approx(expected, rel=1e-9)


# Names that users register


def test_registered_functions_decide_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Advantages 2r are 2 and 0; a loss of 3ρA²: (12 + 12 + 0)/3 tokens, and 12/3 as its slope."""
    monkeypatch.setattr(ADVANTAGES, "_registered", {})
    monkeypatch.setattr(LOSSES, "_registered", {})
    objective = Objective(outcome="doubled", surrogate="squared", kl="none")
    with pytest.raises(ValueError, match="outcome='doubled': (.|\n)*surrogate='squared': "):
        objective.check_names()
    register_advantage("doubled", lambda rewards, members, unbiased: 2 * rewards)
    register_loss(
        "squared",
        lambda x: (3 * x.ratio * x.advantages**2, x.advantages > 1 + x.clip_high),
    )
    objective.check_names()
    advantages = objective.outcome_advantages(torch.tensor([1.0, 0.0]), 2)
    rollouts = [
        Rollout(Prompt([0], ""), Completion([0] * n, [-1.0] * n, True), "", outcome_advantage=a)
        for n, a in zip((2, 1), advantages, strict=True)
    ]
    policy = torch.full((2, 2), -1.0, requires_grad=True)
    loss, stats = objective.loss(policy, None, collate(rollouts, 3, 2), None)
    assert loss.item() == 8
    assert torch.autograd.grad(loss, policy)[0].tolist() == [[4, 4], [0, 0]]
    assert stats["clip_fraction"].item() == pytest.approx(2 / 3)


def test_a_name_that_is_not_registered_is_an_error() -> None:
    Objective().check_names()
    with pytest.raises(ValueError, match=r"model\.objective\.divergence='renyi': .*reverse_kl"):
        Objective(divergence="renyi").check_names()


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


def test_missing_tensors_are_errors() -> None:
    with pytest.raises(ValueError, match="kl='reward_step'"):
        METHODS["kl_reward_step"].outcome_advantages(torch.tensor(REWARDS), GROUP)
    with pytest.raises(ValueError, match="mean_kl"):
        advantages_of_package(Objective(divergence="reverse_k3", baseline=True), draw(False))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": -0.1}, r"model\.objective\.beta=-0\.1: "),
        ({"beta": float("nan")}, "beta=nan: "),
        ({"clip_low": -0.1}, r"clip_low=-0\.1: "),
        ({"clip_low": 2.0}, r"clip_low=2\.0: "),
        ({"clip_high": -0.1}, r"clip_high=-0\.1: "),
        ({"kl": "loss", "steps": 256}, "steps=256 .*kl='loss'"),
        ({"kl": "none", "steps": "newline"}, "steps='newline' .*kl='none'"),
        ({"kl": "none", "baseline": True}, "baseline=True .*kl='none'"),
        ({"baseline": True, "divergence": "reverse_k3", "steps": 4}, "baseline=True .*steps=4"),
        ({"baseline": True, "divergence": "forward_kl"}, "baseline=True .*'forward_kl'"),
        ({"outcome": "raft", "kl": "reward_step"}, "outcome='raft' .*'reward_step'"),
        ({"outcome": "maxrl", "kl": "reward_step"}, "outcome='maxrl' .*'reward_step'"),
        ({"outcome": "maxrl", "decouple_rewards": True}, "'maxrl' .*decouple_rewards=True"),
        ({"aggregation": "constant"}, "max_length=None .*aggregation='constant'"),
        ({"max_length": 100}, "max_length=100 .*aggregation='token_mean'"),
        ({"kl": "proces"}, r"model\.objective\.kl='proces': .*'process'"),
    ],
)
def test_contradictions_are_errors(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Objective(**settings)  # type: ignore[arg-type]
