"""A punishment of long completions."""

from collections.abc import Sequence
from typing import Any


class SoftLengthPunishment:
    """DAPO's soft overlong punishment: 0, then falling to -1 over a buffer before the limit.

    For a completion of n tokens (arXiv 2503.14476, Eq. 13):

    | n | reward |
    | --- | --- |
    | up to max_length - buffer | 0 |
    | up to max_length | (max_length - buffer - n) / buffer |
    | above | -1 |

    The paper has max_length 20480 and buffer 4096.

    Args:
        max_length: Limit in tokens, usually `rollout.max_new_tokens`.
        buffer: Tokens before the limit over which the reward falls.

    Raises:
        ValueError: The buffer is not between 1 and max_length.

    Example:
        >>> reward = SoftLengthPunishment(max_length=10, buffer=4)
        >>> reward(completion_ids=[[1] * 6, [1] * 8, [1] * 10])
        [0.0, -0.5, -1.0]
    """

    def __init__(self, max_length: int, buffer: int) -> None:
        if not 1 <= buffer <= max_length:
            raise ValueError(
                f"SoftLengthPunishment: buffer={buffer} with max_length={max_length}: use a buffer "
                "of 1 to max_length tokens."
            )
        self.max_length = max_length
        self.buffer = buffer

    def __call__(
        self, completion_ids: Sequence[Sequence[int]], **columns: Sequence[Any]
    ) -> list[float]:
        """Punish completions by their number of tokens.

        Args:
            completion_ids: B completions.
            **columns: Not used.

        Returns:
            B rewards between -1 and 0.
        """
        return [self._reward(len(ids)) for ids in completion_ids]

    def _reward(self, length: int) -> float:
        free = self.max_length - self.buffer
        return -min(1.0, max(0, length - free) / self.buffer) + 0.0  # + 0.0: no negative zero
