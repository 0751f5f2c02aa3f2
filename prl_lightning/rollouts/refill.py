"""IterationGroups: which groups an iteration trains on, if groups without signal are refilled."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prl_lightning.data import PromptDataModule
from prl_lightning.data.rollouts import equal_parts, share_of
from prl_lightning.distributed import all_gather
from prl_lightning.types import Prompt, Rollout


class IterationGroups:
    """The groups of one iteration, sampled in rounds until enough of them have a signal.

    The dynamic sampling of DAPO (arXiv 2503.14476, Eq. 11): the first ``prompts_per_epoch`` groups
    with a signal are trained on, in the order of the data. A group has one if its rewards differ,
    whatever they are; in the paper, if some of its answers are right, but not all. If there are not
    as many among the first ``attempts * prompts_per_epoch``, the earliest groups without signal
    take the places that are left. The next iteration begins after the last prompt that was needed.

    Neither the number of ranks nor the size of a round decides which prompts are used: groups that
    a round has sampled beyond the last one needed are dropped, and their prompts come again.

    Args:
        data: has the prompts and the sizes.
        attempts: at most so many times ``prompts_per_epoch`` prompts are sampled. With 1, all of
            them are trained on.
    """

    def __init__(self, data: PromptDataModule, attempts: int) -> None:
        self.data = data
        self.wanted = data.prompts_per_epoch
        self.has_signal: list[bool] = []  # of the groups of all ranks, in the order of the data
        self._is_refilling = attempts > 1
        self._positions = data.positions(attempts)
        self._own: dict[int, Sequence[Rollout]] = {}  # groups of this rank
        self._round: list[list[int]] = []  # groups of each rank in the round under way

    @property
    def sampled(self) -> list[Rollout]:
        """This rank's rollouts of all rounds."""
        return _flat(self._own.values())

    @property
    def passed(self) -> list[Rollout]:
        """This rank's rollouts of every prompt that the next iteration does not sample again."""
        used = needed(self.has_signal, self.wanted)
        return _flat(group for index, group in self._own.items() if index < used)

    @property
    def position(self) -> int:
        """Position in the data after the last prompt that was needed."""
        return self._positions[needed(self.has_signal, self.wanted) - 1] + 1

    def next_prompts(self) -> list[Prompt]:
        """Return this rank's prompts of the next round; none if the iteration is complete.

        Every rank gets the same number.
        """
        first, ranks = len(self.has_signal), self.data.ranks
        size = round_size(self.has_signal, self.wanted, len(self._positions), ranks)
        # The first round as it is trained on, so that no group moves unless one is dropped.
        updates = 1 if first else self.data.updates_per_epoch
        self._round = share_of(range(first, first + size), updates, ranks)
        return self.data.prompts_at(
            [self._positions[index] for index in self._round[self.data.rank]]
        )

    def add(self, rollouts: Sequence[Rollout]) -> None:
        """Take in this rank's rewarded rollouts of the round; a collective."""
        own = self._round[self.data.rank]
        groups = dict(zip(own, equal_parts(rollouts, len(own)), strict=True))
        self._own |= groups
        by_rank = all_gather({index: differs(group) for index, group in groups.items()})
        has_signal = {index: signal for found in by_rank for index, signal in found.items()}
        self.has_signal += [has_signal[index] for index in sorted(has_signal)]

    def chosen(self) -> list[Rollout]:
        """Return this rank's rollouts to train on, update by update; a collective.

        Groups move between ranks where one has more of them than its share.
        """
        indices = choose(self.has_signal, self.wanted)
        shares = share_of(indices, self.data.updates_per_epoch, self.data.ranks)
        own = shares[self.data.rank]
        elsewhere = set(indices) - set(own)
        leaving = {index: group for index, group in self._own.items() if index in elsewhere}
        groups = dict(self._own)
        for arriving in all_gather(leaving):
            groups |= arriving
        return _flat(groups[index] for index in own)

    def metrics(self) -> dict[str, float]:
        """Return the values to log, equal on all ranks; none without refilling."""
        if not self._is_refilling:
            return {}
        unfilled = max(self.wanted - sum(self.has_signal), 0)
        return {
            "refill_attempts": needed(self.has_signal, self.wanted) / self.wanted,
            "refill_discarded": 1 - self.wanted / len(self.has_signal),
            "refill_unfilled": unfilled / self.wanted,
        }


def differs(group: Sequence[Rollout]) -> bool:
    """Whether the rewards of a group differ, so that it has an outcome signal."""
    return any(rollout.reward != group[0].reward for rollout in group)


def choose(has_signal: Sequence[bool], wanted: int) -> list[int]:
    """Return the indices of ``wanted`` groups, in order: those with signal, then the others."""
    by_signal = sorted(range(len(has_signal)), key=lambda index: not has_signal[index])
    return sorted(by_signal[:wanted])


def needed(has_signal: Sequence[bool], wanted: int) -> int:
    """Return how many of the groups are needed to have ``wanted`` with signal; at most all."""
    indices = [index for index, signal in enumerate(has_signal) if signal]
    return indices[wanted - 1] + 1 if len(indices) >= wanted else len(has_signal)


def round_size(has_signal: Sequence[bool], wanted: int, limit: int, ranks: int) -> int:
    """Return how many groups to sample next, over all ranks.

    As many as fill the missing places at the share of groups with signal so far: a few large
    rounds use an engine better than many small ones.

    Args:
        has_signal: of the groups so far.
        wanted: number of groups with signal, a multiple of ``ranks``.
        limit: of all groups, a multiple of ``wanted``.
        ranks: the size is a multiple of it.
    """
    found, sampled = sum(has_signal), len(has_signal)
    if found >= wanted or sampled >= limit:
        return 0
    expected = -(-(wanted - found) * sampled // found) if found else wanted
    whole = -(-expected // ranks) * ranks
    return min(whole, wanted, limit - sampled)


def _flat(groups: Iterable[Sequence[Rollout]]) -> list[Rollout]:
    return [rollout for group in groups for rollout in group]
