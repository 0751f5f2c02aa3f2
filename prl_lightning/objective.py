"""What is maximised: the outcome advantage, the place of the KL, and the loss, as one choice."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args, get_origin, get_type_hints

from torch import Tensor

from prl_lightning.functional import (
    Totals,
    importance_weights,
    kl_in_reward_step_advantages,
    kl_in_reward_trajectory,
    kl_loss,
    outcome_advantages,
    policy_loss,
    prl_advantages,
    process_baseline,
)
from prl_lightning.functional.process import per_token
from prl_lightning.models.step_splitter import Steps
from prl_lightning.types import RolloutBatch

KL_IN_REWARD = ("reward_trajectory", "reward_step")
K3 = ("reverse_k3", "forward_k3")


@dataclass(frozen=True)
class Objective:
    """The methods of the papers as values (METHOD table of PRL v1 and v2).

    Attributes:
        outcome: outcome advantage: "grpo" (mean and standard deviation of the group), "dr_grpo"
            (mean), "rloo" (leave one out), "reward" (the reward itself), "raft" (positives only).
        kl: where the KL to the reference goes: "process" (PRL and FRPO: the process term beside
            the outcome advantage, v2 Eq. 5.1), "loss" (an estimate added to the loss),
            "reward_trajectory" or "reward_step" (inside the reward, before the group statistics),
            "none".
        beta: weight of the KL, 1/eta of v1.
        divergence: generator of the process term: "reverse_kl", "reverse_k3", "forward_kl",
            "forward_k3" or a registered one.
        baseline: subtract the expected process term of the tokens that follow (v2, for the token
            form of the k3 divergences; the paper sees no gain).
        kl_estimator: of kl="loss": "k1", "k2", "k3" or "k3+".
        steps: "token" (v2), a number of tokens, "newline" or "blank_line" (v1).
        log_ratio: policy of the process term: at this update ("current") or at sampling time
            ("rollout"); equal with one update a rollout and no ``rollout.overlap``.
        unbiased_std: divide by n - 1 in the group's standard deviation, as the authors' code does.
        clip_low: the importance ratio is clipped below 1 - clip_low.
        clip_high: and above 1 + clip_high.
        aggregation: "token_mean", "sequence_mean" or "constant".
        max_length: tokens that "constant" divides by; needed for it alone.
        importance_cap: truncated importance weight between engine and trainer; None is off. Not
            with ``rollout.overlap``, where the engine's is the policy that the ratio starts from.
    """

    outcome: Literal["grpo", "dr_grpo", "rloo", "reward", "raft"] = "grpo"
    kl: Literal["process", "loss", "reward_trajectory", "reward_step", "none"] = "process"
    beta: float = 0.01
    divergence: str = "reverse_kl"
    baseline: bool = False
    kl_estimator: Literal["k1", "k2", "k3", "k3+"] = "k3"
    steps: Steps = "token"
    log_ratio: Literal["current", "rollout"] = "current"
    unbiased_std: bool = False
    clip_low: float = 0.2
    clip_high: float = 0.2
    aggregation: Literal["token_mean", "sequence_mean", "constant"] = "token_mean"
    max_length: int | None = None
    importance_cap: float | None = None

    def __post_init__(self) -> None:
        """Refuse values that are none, and settings that contradict each other."""
        for name, hint in get_type_hints(type(self)).items():
            value, choices = getattr(self, name), get_args(hint)
            if get_origin(hint) is Literal and value not in choices:
                raise ValueError(f"model.objective.{name}={value!r}: use one of {choices}.")
        refused = [*self._out_of_range(), *self._contradictions()]
        if refused:
            raise ValueError("\n".join(f"model.objective.{line}" for line in refused))

    def _out_of_range(self) -> Iterator[str]:
        if self.importance_cap is not None and self.importance_cap <= 0:
            yield f"importance_cap={self.importance_cap}: must be above 0, or null."
        if not 0 <= self.beta < float("inf"):
            yield f"beta={self.beta}: must be 0 or a positive number."
        for name, fits in (
            ("clip_low", 0 <= self.clip_low <= 1),
            ("clip_high", self.clip_high >= 0),
        ):
            if not fits:
                yield (
                    f"{name}={getattr(self, name)}: the importance ratio is kept between "
                    "1 - clip_low and 1 + clip_high; clip_low between 0 and 1, clip_high not "
                    "below 0."
                )

    def _contradictions(self) -> Iterator[str]:
        if self.kl != "process" and self.steps != "token":
            yield (
                f"steps={self.steps!r} has no effect with kl={self.kl!r}. Set kl to 'process', or "
                "leave steps out."
            )
        if self.kl in KL_IN_REWARD and self.outcome == "raft":
            yield (
                f"outcome='raft' asks whether a reward is above 0, which it can be by "
                f"kl={self.kl!r} alone. Use another outcome, or another kl."
            )
        has_its_place = self.kl == "process" and self.steps == "token"
        if self.baseline and not (has_its_place and self.divergence in K3):
            yield (
                f"baseline is that of kl='process', steps='token' and a divergence of {K3}, not of "
                f"kl={self.kl!r}, steps={self.steps!r} and {self.divergence!r}. Set these, or "
                "leave baseline out."
            )
        if (self.aggregation == "constant") != (self.max_length is not None):
            yield (
                "max_length goes with aggregation='constant', and only with it: "
                f"aggregation={self.aggregation!r}, max_length={self.max_length}."
            )

    @property
    def needs_reference(self) -> bool:
        """Whether the loss depends on the reference at all."""
        return self.kl != "none" and self.beta > 0

    @property
    def kl_in_reward(self) -> bool:
        """Whether the KL is part of what the groups compare."""
        return self.kl in KL_IN_REWARD and self.beta > 0

    @property
    def needs_log_ratios(self) -> bool:
        """Whether the outcome advantages take the log-ratios at sampling time."""
        return self.kl_in_reward or (self.baseline and self.beta > 0)

    def outcome_advantages(
        self,
        rewards: Tensor,
        group_size: int,
        log_ratios: Tensor | None = None,
        completion_mask: Tensor | None = None,
        mean_kl: Tensor | None = None,
    ) -> Tensor:
        """Compare the completions of each group.

        Args:
            rewards: (B,), groups contiguous.
            group_size: G.
            log_ratios: (B, T), read where ``needs_log_ratios``.
            completion_mask: (B, T), likewise.
            mean_kl: mean f(u) of a token of all rollouts, read for ``baseline``.

        Returns:
            (B,), or (B, T) for kl="reward_step" and with ``baseline``.
        """
        kind, unbiased = self.outcome, self.unbiased_std
        if not self.needs_log_ratios:
            return outcome_advantages(rewards, group_size, kind, unbiased_std=unbiased)
        if log_ratios is None or completion_mask is None:
            raise ValueError("these advantages need log_ratios and completion_mask")
        if self.baseline:
            if mean_kl is None:
                raise ValueError("the baseline needs mean_kl")
            outcome = outcome_advantages(rewards, group_size, kind, unbiased_std=unbiased)
            return outcome[:, None] + self.beta * process_baseline(completion_mask, mean_kl)
        if self.kl == "reward_trajectory":
            shaped = kl_in_reward_trajectory(rewards, log_ratios, completion_mask, self.beta)
            return outcome_advantages(shaped, group_size, kind, unbiased_std=unbiased)
        return kl_in_reward_step_advantages(
            rewards, log_ratios, completion_mask, self.beta, group_size, kind, unbiased_std=unbiased
        )

    def loss(
        self,
        policy_logprobs: Tensor,
        ref_logprobs: Tensor | None,
        batch: RolloutBatch,
        step_ends: Tensor | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a micro-batch, normalised so that an update's micro-batches add up.

        Args:
            policy_logprobs: (B, T) with gradient.
            ref_logprobs: (B, T), or None without a reference.
            batch: the rollouts.
            step_ends: (B, T) bool or None for the token form.

        Returns:
            The loss, and per-token quantities (B, T) and scalars to be logged, all detached.
        """
        mask = batch.completion_mask
        on_policy = policy_logprobs.detach()
        old_logprobs = on_policy if batch.old_logprobs is None else batch.old_logprobs
        outcome = per_token(batch.outcome_advantages, mask, "outcome_advantages")
        advantages, tokens = outcome, {}
        if ref_logprobs is not None and self.kl == "process":
            at_policy = old_logprobs if self.log_ratio == "rollout" else on_policy
            advantages = prl_advantages(
                outcome, at_policy - ref_logprobs, mask, self.beta, self.divergence, step_ends
            )
            # beta * reg_t, in the unit of the outcome advantage that it is taken from.
            tokens["process_term"] = outcome - advantages
        tokens["advantage"] = advantages
        weights = None
        if self.importance_cap is not None:
            weights = importance_weights(old_logprobs, batch.rollout_logprobs, self.importance_cap)
        totals = Totals(batch.update_tokens, batch.update_sequences, self.max_length)
        loss, stats = policy_loss(
            policy_logprobs,
            old_logprobs,
            advantages,
            mask,
            self.clip_low,
            self.clip_high,
            aggregation=self.aggregation,
            totals=totals,
            token_weights=weights,
        )
        if ref_logprobs is not None and self.kl == "loss":
            loss = loss + self.beta * kl_loss(
                policy_logprobs,
                ref_logprobs,
                mask,
                self.kl_estimator,
                aggregation=self.aggregation,
                totals=totals,
            )
        return loss, stats | tokens
