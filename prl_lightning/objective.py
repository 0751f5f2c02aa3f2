"""Objective: the outcome advantage, the references, the place of the KL, and the loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Literal, get_args, get_origin, get_type_hints

from torch import Tensor

from prl_lightning.functional import (
    Aggregation,
    EngineCorrection,
    kl_in_reward_step,
    kl_in_reward_trajectory,
    kl_loss,
    outcome_advantages,
    policy_loss,
    process_baseline,
)
from prl_lightning.functional.advantages import ADVANTAGES
from prl_lightning.functional.losses import LOSSES
from prl_lightning.functional.process import per_token
from prl_lightning.models.step_splitter import Steps
from prl_lightning.references import Reference, centres, process_terms
from prl_lightning.types import RolloutBatch

KL_IN_REWARD = ("reward_trajectory", "reward_step")
NEEDS_SIGN = ("raft", "maxrl")
K3 = ("reverse_k3", "forward_k3")


@dataclass(frozen=True)
class Objective:
    """The training objective. The methods of PRL v1 and v2 are combinations of its values.

    Attributes:
        outcome: outcome advantage: "grpo" (mean and standard deviation of the group), "dr_grpo"
            (mean), "rloo" (leave one out), "reward" (the reward itself), "raft" (positives only),
            "none" (completions are not rewarded in training, as in on-policy distillation),
            "maxrl" (divided by the mean), "batch_std" (by the standard deviation of the iteration),
            or a name of `register_advantage`.
        decouple_rewards: normalise each reward function in its group before their weighted sum;
            with outcome="batch_std" this is GDPO.
        kl: where the KL to the reference goes: "process" (PRL and FRPO: the process term is added
            to the outcome advantage, v2 Eq. 5.1), "loss" (an estimate is added to the loss),
            "reward_trajectory" or "reward_step" (into the reward, before the group statistics),
            "none".
        references: by name, instead of ``beta``, ``target``, ``divergence`` and
            ``model.reference``, which are the short way to write one of them. With kl="process".
        beta: weight of the KL, 1/eta of v1.
        target: nats a token of KL that ``beta`` follows; see `Reference`. null keeps it.
        divergence: generator of the process term: "reverse_kl", "reverse_k3", "forward_kl",
            "forward_k3", or a name of `register_divergence`.
        baseline: subtract the expected process term of the later tokens (v2, for the token form of
            the k3 divergences; the paper sees no gain).
        kl_estimator: of kl="loss": "k1", "k2", "k3" or "k3+".
        steps: "token" (v2), a number of tokens, "newline" or "blank_line" (v1).
        log_ratio: policy of the process term: at this update ("current") or at sampling time
            ("rollout"); equal with one update per rollout and no ``rollout.overlap``.
        unbiased_std: divide by n - 1 in the group's standard deviation, as the authors' code does.
        surrogate: loss of a token: "clip" (PPO, DAPO), "gspo" (ratio of the sequence; its clip
            range is some 1e-4), "cispo", "dual_clip", or a name of `register_loss`.
        clip_low: the lower bound of the importance ratio is 1 - clip_low.
        clip_high: the upper bound of the importance ratio is 1 + clip_high.
        aggregation: "token_mean", "sequence_mean" or "constant".
        max_length: tokens that "constant" divides by; only for "constant", which needs it.
        mask_truncated: leave completions that were cut at the limit out of the loss and of the
            totals that it is divided by. Their rewards still count in their groups.
        engine_correction: importance weights between engine and trainer; None is off. Not with
            ``rollout.overlap``, where the importance ratio starts from the engine's policy.
    """

    outcome: str = "grpo"
    decouple_rewards: bool = False
    kl: Literal["process", "loss", "reward_trajectory", "reward_step", "none"] = "process"
    references: dict[str, Reference] = field(default_factory=dict)
    beta: float = 0.01
    target: float | None = None
    divergence: str = "reverse_kl"
    baseline: bool = False
    kl_estimator: Literal["k1", "k2", "k3", "k3+"] = "k3"
    steps: Steps = "token"
    log_ratio: Literal["current", "rollout"] = "current"
    unbiased_std: bool = False
    surrogate: str = "clip"
    clip_low: float = 0.2
    clip_high: float = 0.2
    aggregation: Literal["token_mean", "sequence_mean", "constant"] = "token_mean"
    max_length: int | None = None
    mask_truncated: bool = False
    engine_correction: EngineCorrection | None = None

    def __post_init__(self) -> None:
        """Check each value and their combinations; `check_names` checks names of registries."""
        for name, hint in get_type_hints(type(self)).items():
            value, choices = getattr(self, name), get_args(hint)
            if get_origin(hint) is Literal and value not in choices:
                raise ValueError(f"model.objective.{name}={value!r}: use one of {choices}.")
        errors = [*self._out_of_range(), *self._contradictions()]
        if errors:
            raise ValueError("\n".join(f"model.objective.{line}" for line in errors))

    def check_names(self) -> None:
        """Check the names that users can register, after their modules were imported.

        Raises:
            ValueError: a divergence, shape, outcome or surrogate is not registered.
        """
        errors = [
            ADVANTAGES.error(self.outcome, "model.objective.outcome"),
            LOSSES.error(self.surrogate, "model.objective.surrogate"),
            *self.short_reference.name_errors("model.objective."),
        ]
        for name, reference in self.references.items():
            errors += reference.name_errors(f"model.objective.references.{name}.")
        if any(errors):
            raise ValueError("\n".join(filter(None, errors)))

    def _out_of_range(self) -> Iterator[str]:
        for name, fits, wanted in (
            ("clip_low", 0 <= self.clip_low <= 1, "must be between 0 and 1"),
            ("clip_high", self.clip_high >= 0, "must be 0 or a positive number"),
        ):
            if not fits:
                yield f"{name}={getattr(self, name)}: {wanted}."
        yield from self.short_reference.errors("")
        for name, reference in self.references.items():
            yield from reference.errors(f"references.{name}.")

    def _contradictions(self) -> Iterator[str]:
        if self.kl != "process" and self.steps != "token":
            yield (
                f"steps={self.steps!r} has no effect with kl={self.kl!r}. Set kl='process', or "
                "leave steps out."
            )
        if self.kl == "none" and self.target is not None:
            yield f"target={self.target} has no effect with kl='none'. Leave one of them out."
        names = ("beta", "target", "divergence")
        short = [name for name in names if getattr(self, name) != _DEFAULTS[name]]
        if self.references and (short or self.baseline or self.kl != "process"):
            yield (
                f"references={list(self.references)} with kl={self.kl!r}, baseline={self.baseline} "
                f"and own {short or 'values'}: references need kl='process' and no baseline, and "
                "each has its own beta and divergence. Leave the others out."
            )
        changes_sign = self.kl in KL_IN_REWARD or self.decouple_rewards
        if changes_sign and self.outcome in NEEDS_SIGN:
            yield (
                f"outcome={self.outcome!r} depends on the sign of rewards, which kl={self.kl!r} "
                f"with decouple_rewards={self.decouple_rewards} changes. Change one of them."
            )
        token_form = self.kl == "process" and self.steps == "token"
        if self.baseline and not (token_form and self.divergence in K3):
            yield (
                f"baseline=True needs kl='process', steps='token' and a divergence of {K3}; got "
                f"kl={self.kl!r}, steps={self.steps!r}, divergence={self.divergence!r}."
            )
        if (self.aggregation == "constant") != (self.max_length is not None):
            yield (
                f"max_length={self.max_length} with aggregation={self.aggregation!r}: "
                "aggregation='constant' needs a max_length, the others take none."
            )

    @property
    def terms(self) -> dict[str, Reference]:
        """The process terms by the name of their reference."""
        return self.named_references if self.kl == "process" and self.needs_reference else {}

    @property
    def named_references(self) -> dict[str, Reference]:
        """The references by name; that of the short form is called "reference"."""
        return self.references or {"reference": self.short_reference}

    @property
    def short_reference(self) -> Reference:
        """The reference that ``beta``, ``target`` and ``divergence`` are the short way to write."""
        return Reference(beta=self.beta, target=self.target, divergence=self.divergence)

    @property
    def steered_betas(self) -> dict[str, float]:
        """The betas that follow a target, by the name of their reference."""
        named = self.named_references.items()
        return {name: one.beta for name, one in named if one.target is not None}

    def steered(self, kls: Sequence[float]) -> Objective:
        """Return the objective of the next iteration.

        Args:
            kls: to each of the ``named_references``, see `Reference.steered`.
        """
        named = zip(self.named_references.items(), kls, strict=True)
        return self.with_betas({name: one.steered(kl).beta for (name, one), kl in named})

    def with_betas(self, betas: Mapping[str, float]) -> Objective:
        """Return the objective with other values of those ``steered_betas`` that are named."""
        named = {
            name: one.with_beta(betas.get(name, one.beta)) if one.target is not None else one
            for name, one in self.named_references.items()
        }
        if self.references:
            return replace(self, references=named)
        return replace(self, beta=named["reference"].beta)

    @property
    def needs_reference(self) -> bool:
        """Whether the loss depends on a reference."""
        return bool(self.references) or (self.kl != "none" and self.beta > 0)

    @property
    def is_rewarded(self) -> bool:
        """Whether training has rewards."""
        return self.outcome != "none"

    @property
    def kl_in_reward(self) -> bool:
        """Whether the KL is part of the rewards that a group compares."""
        return self.kl in KL_IN_REWARD and self.beta > 0

    @property
    def needs_log_ratios(self) -> bool:
        """Whether the outcome advantages depend on the log-ratios at sampling time."""
        is_centred = any(term.centre != "none" for term in self.terms.values())
        return self.kl_in_reward or is_centred or (self.baseline and self.beta > 0)

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
            log_ratios: (B, T, K) to the K references at sampling time; required if
                ``needs_log_ratios``.
            completion_mask: (B, T); required if ``needs_log_ratios``.
            mean_kl: mean f(u) over the tokens of all rollouts; required if ``baseline``.

        Returns:
            (B,), or (B, T) for kl="reward_step", with ``baseline`` and with a centred reference.

        Raises:
            ValueError: a required tensor is missing; see also ``functional.outcome_advantages``.
        """
        compare = partial(
            outcome_advantages,
            group_size=group_size,
            kind=self.outcome,
            unbiased_std=self.unbiased_std,
        )
        if not self.needs_log_ratios:
            return compare(rewards)
        if log_ratios is None or completion_mask is None:
            raise ValueError(f"kl={self.kl!r}: pass log_ratios and completion_mask.")
        if self.kl in KL_IN_REWARD:
            first = log_ratios[..., 0]
            if self.kl == "reward_trajectory":
                return compare(kl_in_reward_trajectory(rewards, first, completion_mask, self.beta))
            shaped = kl_in_reward_step(rewards, first, completion_mask, self.beta)
            return compare(shaped, completion_mask=completion_mask)
        if not self.baseline:
            added = centres(self.terms.values(), log_ratios, completion_mask, group_size)
            return compare(rewards)[:, None] + added
        if mean_kl is None:
            raise ValueError("baseline=True: pass mean_kl.")
        return compare(rewards)[:, None] + self.beta * process_baseline(completion_mask, mean_kl)

    def loss(
        self,
        policy_logprobs: Tensor,
        ref_logprobs: Tensor | None,
        batch: RolloutBatch,
        step_ends: Tensor | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of a micro-batch; the losses of an update's micro-batches add up.

        Args:
            policy_logprobs: (B, T) with gradient.
            ref_logprobs: (B, T, K) of the K references, or None without any.
            batch: the rollouts.
            step_ends: bool (B, T), or None for the token form.

        Returns:
            The loss, and values to log: (B, T) per token and scalars, all detached.
        """
        mask = batch.completion_mask
        on_policy = policy_logprobs.detach()
        old_logprobs = on_policy if batch.old_logprobs is None else batch.old_logprobs
        outcome = per_token(batch.outcome_advantages, mask, "outcome_advantages")
        advantages, tokens = outcome, {}
        if ref_logprobs is not None and self.terms:
            at_policy = old_logprobs if self.log_ratio == "rollout" else on_policy
            log_ratios = at_policy[..., None] - ref_logprobs
            tokens["process_term"] = process_terms(self.terms.values(), log_ratios, mask, step_ends)
            advantages = outcome - tokens["process_term"]
        tokens["advantage"] = advantages
        weights = None
        if self.engine_correction is not None:
            weights, outside = self.engine_correction.weights(
                old_logprobs, batch.rollout_logprobs, mask
            )
            tokens["engine_corrected"] = outside.float()
        aggregation = Aggregation(
            self.aggregation, batch.update_tokens, batch.update_sequences, self.max_length
        )
        loss, stats = policy_loss(
            policy_logprobs,
            old_logprobs,
            advantages,
            mask,
            self.clip_low,
            self.clip_high,
            surrogate=self.surrogate,
            aggregation=aggregation,
            token_weights=weights,
        )
        if ref_logprobs is not None and self.kl == "loss":
            loss = loss + self.beta * kl_loss(
                policy_logprobs, ref_logprobs[..., 0], mask, self.kl_estimator, aggregation
            )
        return loss, stats | tokens


_DEFAULTS = {field.name: field.default for field in fields(Objective)}
