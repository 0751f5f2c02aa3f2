"""Environments and a tool. The sandbox loads this file, so it imports little."""

from __future__ import annotations

import os
import random
import threading
import time
from typing import Any


def shout(text: str) -> str:
    """Write a text in capital letters.

    Args:
        text: What to write.
    """
    return text.upper()


class Sum:
    """Add numbers until they reach the row's goal; draws where it begins."""

    def reset(self, goal: int, **row: Any) -> str:
        self.goal = goal
        self.total = random.randrange(3)
        self.done = False
        return f"{self.total}?"

    def add(self, number: int) -> int:
        """Add a number.

        Args:
            number: To add.
        """
        self.total += number
        self.done = self.total >= self.goal
        return self.total

    def get_reward(self) -> float:
        return float(self.total == self.goal)


class Hostile(Sum):
    """Its tools do what an environment must not do."""

    def hang(self) -> None:
        """Never return."""
        time.sleep(3600)

    def leave(self) -> None:
        """End the process."""
        os._exit(3)

    def fail(self) -> None:
        """Raise."""
        raise ValueError("out of order")

    def flood(self) -> str:
        """Return more than anybody reads."""
        return "7" * 10**6

    def fill(self) -> str:
        """Take all memory."""
        return str(len([bytearray(2**20) for _ in range(2**14)]))


class Unkept(Sum):
    """Cannot be pickled."""

    def reset(self, goal: int, **row: Any) -> str:
        self.connection = threading.Lock()
        return super().reset(goal)
