"""Rewards of an iteration's rollouts, and a record of what could not be judged."""

from __future__ import annotations

import sys
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from tqdm import tqdm

from prl_lightning.callbacks.completions import prompt_text
from prl_lightning.callbacks.parts import append_rows, shows_progress, sum_over_ranks
from prl_lightning.rewards import RewardScores, RewardSum
from prl_lightning.types import Rollout

FAILURES = "reward_failures.jsonl"
_KEPT = 16  # of a rank's failures at a time
_KEPT_CHARACTERS = 4000


class Rewarder:
    """Call the reward functions, count what fails, and stop where too much does.

    Args:
        rewards: their weighted sum.
    """

    def __init__(self, rewards: RewardSum) -> None:
        self.rewards = rewards
        self._shown: set[tuple[str, str]] = set()

    def reward(self, trainer: Trainer, rollouts: list[Rollout]) -> dict[str, float]:
        """Fill in ``rollout.reward``; a collective.

        Args:
            trainer: for the run's folder, and the other ranks.
            rollouts: to reward.

        Returns:
            What to log of it.

        Raises:
            RuntimeError: more than ``limits.max_failures`` of all ranks' completions failed.
        """
        names = set.intersection(*(set(rollout.prompt.columns) for rollout in rollouts))
        columns = {name: [r.prompt.columns[name] for r in rollouts] for name in names}
        columns["completion_ids"] = [r.completion.token_ids for r in rollouts]
        calls = len(rollouts) * len(self.rewards.names)
        hidden = not (shows_progress(trainer) and self.rewards.limits)
        # A bar for what takes long: most rewards are there within a second.
        with tqdm(total=calls, desc="rewarding", disable=hidden, delay=3, leave=False) as bar:
            scores = self.rewards.score(
                [r.prompt.source for r in rollouts], [r.text for r in rollouts], columns, bar.update
            )
        for rollout, reward in zip(rollouts, scores.total.tolist(), strict=True):
            rollout.reward = reward
        self._note_failures(trainer, rollouts, scores)
        values = {f"reward_failures/{k}": float(v) for k, v in scores.failures.items()}
        if len(scores.parts) > 1:
            values |= {f"reward/{k}": v.nanmean().item() for k, v in scores.parts.items()}
        return values | {"unrewarded": float(scores.unrewarded)}

    def number_answers(self, rollouts: list[Rollout], group_size: int) -> None:
        """Fill in ``rollout.answer``, where a reward function tells answers apart.

        Args:
            rollouts: groups contiguous.
            group_size: completions a prompt.
        """
        texts = [rollout.text for rollout in rollouts]
        groups = [texts[i : i + group_size] for i in range(0, len(texts), group_size)]
        numbers = [number for group in self.rewards.answers(groups) or [] for number in group]
        if numbers:
            for rollout, number in zip(rollouts, numbers, strict=True):
                rollout.answer = number

    def _note_failures(
        self, trainer: Trainer, rollouts: list[Rollout], scores: RewardScores
    ) -> None:
        limits = self.rewards.limits
        if limits is None:
            return
        failed = {call.index for call in scores.failed_calls}
        counts = torch.tensor([len(failed), len(rollouts)], dtype=torch.float64)
        failures, size = sum_over_ranks(trainer, counts).tolist()
        if not failures:
            return
        for call in scores.failed_calls:
            kind = (call.name, call.failure.kind)
            if kind not in self._shown:
                self._shown.add(kind)
                # On whichever rank it is first seen: another may never see it.
                words = call.failure.traceback or call.failure.message
                print(f"{call.name}: {call.failure.kind}: {words}", file=sys.stderr, flush=True)
        append_rows(trainer, FAILURES, _rows(trainer, rollouts, scores))
        rank_zero_warn(
            f"{failures:.0f} of {size:.0f} completions could not be judged; their reward is "
            f"{limits.failure_value}. {FAILURES} of the run's folder has some of them."
        )
        if failures > limits.max_failures * size:
            raise RuntimeError(
                f"{failures:.0f} of {size:.0f} completions could not be judged, more than "
                f"limits.max_failures={limits.max_failures} allows: {_kinds(scores)}. {FAILURES} "
                "of the run's folder has their prompts. Mend the reward function, raise "
                "limits.seconds or limits.memory_mib, or allow more."
            )


def _kinds(scores: RewardScores) -> str:
    """How many of what kind, with the first one's words."""
    kinds = [f"{call.name}: {call.failure.kind}" for call in scores.failed_calls]
    if not kinds:
        return "on other ranks"
    counted = ", ".join(f"{kind} x{kinds.count(kind)}" for kind in dict.fromkeys(kinds))
    return f"{counted} ({scores.failed_calls[0].failure.message})"


def _rows(trainer: Trainer, rollouts: list[Rollout], scores: RewardScores) -> list[dict[str, Any]]:
    return [
        {
            "step": trainer.global_step,
            "rank": trainer.global_rank,
            "function": call.name,
            "kind": call.failure.kind,
            "message": call.failure.message,
            "prompt": prompt_text(rollouts[call.index].prompt.source)[:_KEPT_CHARACTERS],
            "completion": rollouts[call.index].text[:_KEPT_CHARACTERS],
        }
        for call in scores.failed_calls[:_KEPT]
    ]
