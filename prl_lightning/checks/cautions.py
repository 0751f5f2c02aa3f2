"""Settings that work, but probably not as meant: warnings before a run starts, and a hint in it."""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from prl_lightning.checks.contradictions import is_available
from prl_lightning.data import PromptDataModule
from prl_lightning.functional.precision import has_bf16_instructions
from prl_lightning.models.loading import load_tokenizer, stop_token_ids
from prl_lightning.module import PRLModule
from prl_lightning.rollouts.settings import RolloutSettings
from prl_lightning.sampling.stops import split_stops, turn_end


def warn_of_greedy(data: PromptDataModule) -> None:
    """Warn if the completions of a problem are all equal in evaluations."""
    if data.eval_sources and data.evaluation.caution:
        rank_zero_warn(data.evaluation.caution)


def warn_of_one_step(module: PRLModule, rollout: RolloutSettings) -> None:
    """Warn if no completion can be long enough for a second step."""
    steps = module.objective.steps
    if isinstance(steps, int) and steps >= rollout.max_new_tokens:
        rank_zero_warn(
            f"model.objective.steps={steps}, but rollout.max_new_tokens={rollout.max_new_tokens}: "
            "every completion is one step. Lower steps, or raise max_new_tokens."
        )


def warn_of_turn_end(module: PRLModule, data: PromptDataModule, rollout: RolloutSettings) -> None:
    """Warn if what the chat template closes a turn with does not end a completion."""
    if data.format.chat_template is False or not is_available(module.policy_name, data):
        return
    tokenizer = load_tokenizer(module.policy_name)
    closing = turn_end(tokenizer, data.format.chat_template_args)
    more, texts = split_stops(rollout.stop, tokenizer)
    if closing is None or any(text in closing[0] for text in texts):
        return
    if not set(closing[1]) & set(stop_token_ids(module.policy_name, tokenizer, more)):
        rank_zero_warn(
            f"the chat template closes a turn with {closing[0]!r}, which neither the tokenizer nor "
            f"the generation config of model.policy={module.policy_name!r} has as a stop token: a "
            f"completion goes on after it. Set rollout.stop to [{closing[0]!r}] to end it there."
        )


def signal_hint(values: dict[str, float], solved_at: float, refill: int) -> str | None:
    """Return what to do about groups without signal, or None if most groups have one.

    Args:
        values: of an iteration, by the names of ``rollout/NAME``.
        solved_at: reward from which a completion is correct.
        refill: see ``RolloutCallback``.
    """
    share, reward = values.get("groups_without_signal", 0.0), values.get("reward", 0.0)
    unfilled = values.get("refill_unfilled", 0.0)
    if share <= 0.5 or (refill > 1 and not unfilled):
        return None
    others = "harder" if reward >= solved_at else "easier"
    again = (
        "set rollout.refill to sample others in their place"
        if refill == 1
        else f"raise rollout.refill={refill}, which left {unfilled:.0%} of the places to them"
    )
    return (
        f"rollout/groups_without_signal={share:.2f}: these groups have equal rewards, so they "
        f"teach nothing about the outcome. The mean reward is {reward:.2f}: take {others} prompts, "
        f"raise data.group_size, or {again}. docs/metrics.md has more."
    )


def warn_of_slow_precision(trainer: Trainer) -> None:
    """Warn if the CPU has no bfloat16 instructions: torch then converts each number by itself."""
    precision = str(trainer.precision)
    on_cpu = trainer.strategy.root_device.type == "cpu"
    if on_cpu and precision.startswith("bf16") and not has_bf16_instructions():
        rank_zero_warn(
            f"trainer.precision={precision}, but this CPU has no bfloat16 instructions "
            "(avx512_bf16 or amx_bf16): updates may take several times longer than in float32. Set "
            "trainer.precision=32-true."
        )
