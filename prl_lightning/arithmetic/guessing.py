"""A game that one turn cannot win: guess a number, and hear whether it is higher or lower."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, ClassVar


def hint(number: int, secret: int) -> str:
    """Return "+" if the number to find is higher than a guess, "-" if lower, "=" if this is it."""
    return "=" if number == secret else "+" if number < secret else "-"


class GuessingGame:
    """An environment with one tool, ``guess``; its reward is 1 if the number was found.

    Attributes:
        done: whether the number was found.
    """

    def __init__(self) -> None:
        self.done = False

    def reset(self, secret: int, **row: Any) -> None:
        """Begin a game.

        Args:
            secret: the number to find.
            row: other columns.
        """
        self._secret = secret
        self.done = False

    def guess(self, number: int) -> str:
        """Guess the number.

        Args:
            number: The guess.

        Returns:
            "+" if the number to find is higher, "-" if it is lower, "=" if this is it.
        """
        self.done = number == self._secret
        return hint(number, self._secret)

    def get_reward(self) -> float:
        """Return 1 if the number was found, else 0."""
        return float(self.done)


@dataclass(frozen=True)
class Game:
    """A game as the base model sees it played.

    Attributes:
        secret: the number to find, from 1 to ``largest``.
    """

    largest: ClassVar[int] = 31  # five guesses find each of these, if each halves what is left
    turns: ClassVar[int] = 6
    prompt: ClassVar[str] = "?"

    secret: int

    @property
    def row(self) -> dict[str, Any]:
        """The row of the data."""
        return {"prompt": self.prompt, "secret": self.secret}

    def trace(self, error_rate: float, rng: random.Random) -> str:
        r"""Play a game.

        Args:
            error_rate: probability that a guess is any number at all, instead of the middle one of
                those that are still possible.
            rng: source of the guesses.

        Example:
            >>> Game(20).trace(0.0, random.Random(0))
            '16?+\n24?-\n20?=\n'
        """
        low, high, lines = 1, self.largest, []
        for _ in range(self.turns):
            is_blind = rng.random() < error_rate
            guess = rng.randint(1, self.largest) if is_blind else (low + high) // 2
            answer = hint(guess, self.secret)
            lines.append(f"{guess}?{answer}\n")
            if answer == "=":
                break
            low, high = (
                (max(low, guess + 1), high) if answer == "+" else (low, min(high, guess - 1))
            )
        return "".join(lines)
