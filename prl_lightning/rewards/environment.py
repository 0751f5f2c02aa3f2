"""The reward that an environment gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class EnvironmentReward:
    """Reward what ``get_reward()`` of the completion's environment returned at its end.

    Other reward functions can have it as well: an argument ``environment_reward``.
    """

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        environment_reward: Sequence[float | None],
    ) -> list[float | None]:
        """Return the rewards of B completions.

        Args:
            prompts: B prompts; not used.
            completions: B completions; not used.
            environment_reward: B rewards; None of environments without ``get_reward``.
        """
        return list(environment_reward)
