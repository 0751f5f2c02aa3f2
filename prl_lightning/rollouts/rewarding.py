"""Rewards of an iteration's rollouts, and a record of what could not be judged."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from prl_lightning.callbacks.completion_log import prompt_text
from prl_lightning.rewards import RewardScores, RewardSum
from prl_lightning.rewards.tasks import Failure
from prl_lightning.runs.progress import progress_bar
from prl_lightning.trainer_access import append_rows, sum_over_ranks
from prl_lightning.types import Rollout

FAILURES = "reward_failures.jsonl"
_KEPT = 16  # of a rank's failures at a time
_KEPT_CHARACTERS = 4000


class Rewarder:
    """Call the reward functions, count what fails, and stop where too much does.

    Of what fails, the run's ``reward_failures.jsonl`` has the first 16 of every rank and iteration.

    Args:
        rewards: their weighted sum.
    """

    def __init__(self, rewards: RewardSum) -> None:
        self.rewards = rewards
        self._shown: set[tuple[str, str]] = set()
        self._unjudged: list[Rollout] = []

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
        sources, texts = [r.prompt.source for r in rollouts], [r.text for r in rollouts]
        with progress_bar(trainer, "Rewarding", calls) as advance:
            scores = self.rewards.score(sources, texts, columns, partial(advance, 1, ""))
        for rollout, reward in zip(rollouts, scores.total.tolist(), strict=True):
            rollout.reward = reward
        self._unjudged = [
            rollouts[call.index]
            for call in scores.failed_calls
            if call.name == self.rewards.answering
        ]
        self._note_failures(trainer, rollouts, scores)
        values = {f"reward_failures/{k}": float(v) for k, v in scores.failures.items()}
        if len(scores.parts) > 1:
            values |= {f"reward/{k}": v.nanmean().item() for k, v in scores.parts.items()}
        return values | {"unrewarded": float(scores.unrewarded)}

    def number_answers(self, trainer: Trainer, rollouts: list[Rollout], group_size: int) -> None:
        """Fill in ``rollout.answer``, where a reward function tells answers apart; a collective.

        Completions that it could not judge are not compared: each has an answer of its own.

        Args:
            trainer: knows the ranks and the run's folder.
            rollouts: groups contiguous, of those rewarded last.
            group_size: completions a prompt.
        """
        texts = [rollout.text for rollout in rollouts]
        groups = [texts[i : i + group_size] for i in range(0, len(texts), group_size)]
        unjudged = {id(rollout) for rollout in self._unjudged}
        left_out = {divmod(i, group_size) for i, r in enumerate(rollouts) if id(r) in unjudged}
        answers = self.rewards.answers(groups, left_out)
        if answers is None:
            return
        numbers = [number for group in answers.numbers for number in group]
        for rollout, number in zip(rollouts, numbers, strict=True):
            rollout.answer = number
        if self.rewards.limits is not None:
            first = {group * group_size: failure for group, failure in answers.failures.items()}
            self._note_not_compared(trainer, rollouts, first, len(groups))

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
            self._show_once(call.name, call.failure)
        append_rows(
            trainer,
            FAILURES,
            [
                _row(trainer, call.name, call.failure, rollouts[call.index])
                for call in scores.failed_calls[:_KEPT]
            ],
        )
        rank_zero_warn(
            f"{failures:.0f} of {size:.0f} completions could not be judged; their reward is "
            f"{limits.failure_value}. {FAILURES} of the run's folder has the first {_KEPT} of each "
            "rank."
        )
        if failures > limits.max_failures * size:
            raise RuntimeError(
                f"{failures:.0f} of {size:.0f} completions could not be judged, more than "
                f"limits.max_failures={limits.max_failures} allows: {_kinds(scores)}. {FAILURES} "
                "of the run's folder has their prompts. Mend the reward function, raise "
                "limits.seconds or limits.memory_mib, or allow more."
            )

    def _note_not_compared(
        self, trainer: Trainer, rollouts: list[Rollout], failures: dict[int, Failure], groups: int
    ) -> None:
        """Of groups, known by their first rollouts; a collective."""
        name = f"{self.rewards.answering}.answers"
        counts = torch.tensor([len(failures), groups], dtype=torch.float64)
        failed, size = sum_over_ranks(trainer, counts).tolist()
        if not failed:
            return
        for failure in failures.values():
            self._show_once(name, failure)
        rows = [_row(trainer, name, failure, rollouts[i]) for i, failure in failures.items()]
        append_rows(trainer, FAILURES, rows[:_KEPT])
        rank_zero_warn(
            f"the answers of {failed:.0f} of {size:.0f} groups could not be compared: each "
            "completion of them counts as an answer of its own, in maj@n. "
            f"{FAILURES} of the run's folder has their prompts and first completions."
        )

    def _show_once(self, name: str, failure: Failure) -> None:
        """The traceback, on whichever rank it is first seen: another may never see it."""
        if (name, failure.kind) not in self._shown:
            self._shown.add((name, failure.kind))
            words = failure.traceback or failure.message
            print(f"{name}: {failure.kind}: {words}", file=sys.stderr, flush=True)


def _kinds(scores: RewardScores) -> str:
    """How many of what kind, with the first one's words."""
    kinds = [f"{call.name}: {call.failure.kind}" for call in scores.failed_calls]
    if not kinds:
        return "on other ranks"
    counted = ", ".join(f"{kind} x{kinds.count(kind)}" for kind in dict.fromkeys(kinds))
    return f"{counted} ({scores.failed_calls[0].failure.message})"


def _row(trainer: Trainer, name: str, failure: Failure, rollout: Rollout) -> dict[str, Any]:
    return {
        "step": trainer.global_step,
        "rank": trainer.global_rank,
        "function": name,
        "kind": failure.kind,
        "message": failure.message,
        "prompt": prompt_text(rollout.prompt.source)[:_KEPT_CHARACTERS],
        "completion": rollout.text[:_KEPT_CHARACTERS],
    }
