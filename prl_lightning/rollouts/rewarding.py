"""Rewarder: rewards of rollouts, and a record of failed reward calls."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from prl_lightning.distributed import sum_over_ranks
from prl_lightning.rewards import RewardScores, RewardSum
from prl_lightning.rewards.sandbox.limits import Failure
from prl_lightning.runs.progress import progress_bar
from prl_lightning.runs.text import prompt_text
from prl_lightning.trainer_access import append_rows
from prl_lightning.types import Rollout

FAILURES = "reward_failures.jsonl"
WRITTEN = 16  # failures written per rank and iteration
WRITTEN_CHARACTERS = 4000

# Name of the function, why it failed, and a rollout that it was called with.
Failed = tuple[str, Failure, Rollout]
Scored = tuple[list[Rollout], RewardScores]


class Rewarder:
    """Call the reward functions, count failures, and stop the run if there are too many.

    ``reward_failures.jsonl`` in the run's folder gets the first 16 failures of every rank and
    call of ``summarize``.

    Args:
        rewards: the reward functions.
        trainer: for the run's folder and the other ranks.
    """

    def __init__(self, rewards: RewardSum, trainer: Trainer) -> None:
        self.rewards = rewards
        self.trainer = trainer
        self._printed: set[tuple[str, str]] = set()

    def reward(self, rollouts: list[Rollout], group_size: int | None = None) -> dict[str, float]:
        """Set ``reward`` of every rollout; a collective.

        Args:
            rollouts: groups contiguous.
            group_size: completions per prompt; if given, ``answer`` of every rollout is set too.

        Returns:
            Values to log, see ``summarize``.

        Raises:
            RuntimeError: more than ``limits.max_failures`` of all ranks' completions failed.
        """
        scored = self.score(rollouts)
        values = self.summarize(scored)
        if group_size is not None:
            self._compare_answers(rollouts, group_size, _failed(scored))
        return values

    def score(self, rollouts: list[Rollout]) -> list[Scored]:
        """Set ``reward`` of every rollout, and return the scores for ``summarize``."""
        calls = len(rollouts) * len(self.rewards.names)
        with progress_bar(self.trainer, "Rewarding", calls) as advance:
            return [
                (own, self._score(own, partial(advance, 1, "")))
                for own in _by_columns(rollouts).values()
            ]

    def summarize(self, scored: Sequence[Scored]) -> dict[str, float]:
        """Record the failures of one or several calls of ``score``; a collective.

        Returns:
            Values to log: failures per function, rewards per function if there are several, and the
            number of completions that no function rewarded.

        Raises:
            RuntimeError: more than ``limits.max_failures`` of all ranks' completions failed.
        """
        self._check_failures(_failed(scored), sum(len(own) for own, _ in scored))
        return self._values([scores for _, scores in scored])

    def _score(self, rollouts: list[Rollout], done: Callable[[], Any]) -> RewardScores:
        """Set ``reward`` and its parts of rollouts that have the same columns."""
        columns = {
            name: [rollout.prompt.columns[name] for rollout in rollouts]
            for name in rollouts[0].prompt.columns
        }
        columns["completion_ids"] = [r.completion.token_ids for r in rollouts]
        columns["environment_reward"] = [r.completion.environment_reward for r in rollouts]
        sources, texts = [r.prompt.source for r in rollouts], [_shown(r) for r in rollouts]
        scores = self.rewards.score(sources, texts, columns, done)
        parts = torch.stack(list(scores.parts.values()), dim=1).tolist()
        limits = self.rewards.limits
        for rollout, reward, own in zip(rollouts, scores.total.tolist(), parts, strict=True):
            has_failed = rollout.completion.failure
            rollout.reward = limits.failure_value if limits and has_failed else reward
            rollout.reward_parts = list(zip(self.rewards.weights, own, strict=True))
        return scores

    def _values(self, scores: list[RewardScores]) -> dict[str, float]:
        """Return the values to log; a collective if there are several functions."""
        names = self.rewards.names
        values = {
            f"reward_failures/{name}": float(sum(part.failures[name] for part in scores))
            for name in names
        }
        if len(names) > 1:
            parts = torch.stack(
                [torch.cat([part.parts[name] for part in scores]) for name in names]
            ).double()
            totals = torch.stack([parts.nansum(1), (~parts.isnan()).sum(1)])
            sums, counts = sum_over_ranks(totals)
            means = (sums / counts).tolist()  # NaN if the function applied to no completion
            values |= {f"reward/{name}": mean for name, mean in zip(names, means, strict=True)}
        return values | {"unrewarded": float(sum(part.unrewarded for part in scores))}

    def _compare_answers(
        self, rollouts: list[Rollout], group_size: int, failed: Sequence[Failed]
    ) -> None:
        """Set ``answer`` of every rollout, if a reward function compares answers.

        Completions that the function failed on are not compared: each counts as a distinct answer.
        """
        texts = [rollout.text for rollout in rollouts]
        groups = [texts[i : i + group_size] for i in range(0, len(texts), group_size)]
        unjudged = {id(rollout) for name, _, rollout in failed if name == self.rewards.answering}
        left_out = {
            divmod(i, group_size) for i, rollout in enumerate(rollouts) if id(rollout) in unjudged
        }
        answers = self.rewards.answers(groups, left_out)
        if answers is None:
            return
        numbers = [number for group in answers.numbers for number in group]
        for rollout, number in zip(rollouts, numbers, strict=True):
            rollout.answer = number
        name = f"{self.rewards.answering}.answers"
        errors = [(name, f, rollouts[g * group_size]) for g, f in answers.failures.items()]
        count, total = self._record(errors, len(errors), len(groups))
        if count:
            rank_zero_warn(
                f"{count:.0f} of {total:.0f} groups: their answers could not be compared, so each "
                f"completion counts as a distinct answer in maj@n. {FAILURES} in the run's folder "
                "has their prompts and first completions."
            )

    def _check_failures(self, failed: Sequence[Failed], completions: int) -> None:
        limits = self.rewards.limits
        if limits is None:
            return
        rollouts = {id(rollout) for _, _, rollout in failed}
        count, total = self._record(failed, len(rollouts), completions)
        if not count:
            return
        rank_zero_warn(
            f"{count:.0f} of {total:.0f} completions: a reward function or an environment failed, "
            f"so their reward is limits.failure_value={limits.failure_value}. {FAILURES} in the "
            f"run's folder has the first {WRITTEN} of each rank."
        )
        if count > limits.max_failures * total:
            raise RuntimeError(
                f"a reward function or environment failed on {count:.0f} of {total:.0f} "
                f"completions, more than limits.max_failures={limits.max_failures} allows: "
                f"{_kinds(failed)}. {FAILURES} in the run's folder has their prompts. Fix it, or "
                "raise limits.seconds, limits.memory_mib or limits.max_failures."
            )

    def _record(self, failed: Sequence[Failed], count: int, total: int) -> tuple[float, float]:
        """Print and write failures, and add up ``count`` and ``total`` over ranks; a collective."""
        own = torch.tensor([count, total], dtype=torch.float64)
        all_count, all_total = sum_over_ranks(own).tolist()
        for name, failure, _ in failed:
            if (name, failure.kind) not in self._printed:
                # On the rank where it happens: the first rank may never see it.
                self._printed.add((name, failure.kind))
                text = failure.traceback or failure.message
                print(f"{name}: {failure.kind}: {text}", file=sys.stderr, flush=True)
        if all_count:
            rows = [self._row(*one) for one in failed[:WRITTEN]]
            append_rows(self.trainer, FAILURES, rows)
        return all_count, all_total

    def _row(self, name: str, failure: Failure, rollout: Rollout) -> dict[str, Any]:
        return {
            "step": self.trainer.global_step,
            "rank": self.trainer.global_rank,
            "function": name,
            "kind": failure.kind,
            "message": failure.message,
            "prompt": prompt_text(rollout.prompt.source)[:WRITTEN_CHARACTERS],
            "completion": rollout.text[:WRITTEN_CHARACTERS],
        }


def _failed(scored: Sequence[Scored]) -> list[Failed]:
    of_rewards = [
        (call.name, call.failure, own[call.index])
        for own, scores in scored
        for call in scores.failed_calls
    ]
    of_environments = [
        ("environment", Failure(*rollout.completion.failure.split(": ", 1)), rollout)
        for own, _ in scored
        for rollout in own
        if rollout.completion.failure
    ]
    return of_environments + of_rewards


def _shown(rollout: Rollout) -> Any:
    """Return what reward functions get: the messages of an episode, if its prompt is a chat."""
    is_chat = not isinstance(rollout.prompt.source, str)
    return rollout.completion.messages if is_chat and rollout.completion.messages else rollout.text


def _by_columns(rollouts: list[Rollout]) -> dict[frozenset[str], list[Rollout]]:
    """Group rollouts by the columns of their source: a function gets no column that it lacks."""
    groups: dict[frozenset[str], list[Rollout]] = {}
    for rollout in rollouts:
        groups.setdefault(frozenset(rollout.prompt.columns), []).append(rollout)
    return groups


def _kinds(failed: Sequence[Failed]) -> str:
    """Count the kinds of failures, and quote the first message."""
    kinds = [f"{name}: {failure.kind}" for name, failure, _ in failed]
    if not kinds:
        return "on other ranks"
    counted = ", ".join(f"{kind} x{kinds.count(kind)}" for kind in dict.fromkeys(kinds))
    return f"{counted} ({failed[0][1].message})"
