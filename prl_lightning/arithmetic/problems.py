"""The problem: left-to-right arithmetic with a modulus, solved step by step."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

OPERATIONS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}
ANSWER_OPENS, ANSWER_CLOSES = "\\boxed{", "}"


class Traced(Protocol):
    """What the base model learns from."""

    @property
    def prompt(self) -> str:
        """The text that the model completes."""

    @property
    def row(self) -> dict[str, Any]:
        """The row of the data."""

    def trace(self, error_rate: float, rng: random.Random) -> str:
        """Write a completion with errors."""


@dataclass(frozen=True)
class Problem:
    """An expression that is evaluated from left to right; each result is taken modulo a number.

    Attributes:
        digits: one more than there are operators.
        operators: "+", "-" or "*".
        modulus: results are below it; a guess is right with probability 1 / modulus.

    Example:
        >>> problem = Problem((3, 5, 2), ("+", "*"))
        >>> problem.prompt, problem.answer
        ('3+5*2?', '6')
    """

    digits: tuple[int, ...]
    operators: tuple[str, ...]
    modulus: int = 10

    @property
    def prompt(self) -> str:
        """The text that the model completes."""
        rest = zip(self.operators, self.digits[1:], strict=True)
        return f"{self.digits[0]}{''.join(f'{op}{digit}' for op, digit in rest)}?"

    @property
    def answer(self) -> str:
        """The correct final result."""
        value = self.digits[0]
        for op, digit in zip(self.operators, self.digits[1:], strict=True):
            value = OPERATIONS[op](value, digit) % self.modulus
        return str(value)

    @property
    def row(self) -> dict[str, str]:
        """The row of the data."""
        return {"prompt": self.prompt, "answer": self.answer}

    def trace(self, error_rate: float, rng: random.Random, call_rate: float = 0.0) -> str:
        r"""Write the steps, each with a wrong result with some probability.

        Args:
            error_rate: probability of a wrong result, uniform over the other values. The next step
                continues from the wrong result.
            rng: source of the errors.
            call_rate: probability that a step asks a calculator, which makes no error.

        Returns:
            One line per step, then the final result in a box.

        Example:
            >>> Problem((3, 5, 2), ("+", "*")).trace(0.0, random.Random(0))
            '3+5=8\n8*2=6\n\\boxed{6}'
        """
        value, lines = self.digits[0], []
        for op, digit in zip(self.operators, self.digits[1:], strict=True):
            result = OPERATIONS[op](value, digit) % self.modulus
            asks = call_rate > 0 and rng.random() < call_rate  # no draw if nothing is asked
            if not asks and rng.random() < error_rate:
                result = (result + rng.randint(1, self.modulus - 1)) % self.modulus
            lines.append(f"{value}{op}{digit}{'?' if asks else ''}={result}")
            value = result
        return "\n".join([*lines, f"{ANSWER_OPENS}{value}{ANSWER_CLOSES}"])


@dataclass(frozen=True)
class WithCalls:
    """A problem whose traces ask a calculator at some steps: ``3+5?`` gets the answer ``=8``.

    Attributes:
        problem: that is solved.
        rate: probability that a step asks.
    """

    problem: Problem
    rate: float

    @property
    def prompt(self) -> str:
        """See ``Problem.prompt``."""
        return self.problem.prompt

    @property
    def row(self) -> dict[str, str]:
        """See ``Problem.row``."""
        return self.problem.row

    def trace(self, error_rate: float, rng: random.Random) -> str:
        r"""See ``Problem.trace``.

        Example:
            >>> WithCalls(Problem((3, 5, 2), ("+", "*")), 1.0).trace(0.5, random.Random(0))
            '3+5?=8\n8*2?=6\n\\boxed{6}'
        """
        return self.problem.trace(error_rate, rng, self.rate)


def draw_problems(
    min_operations: int, max_operations: int, seed: int, modulus: int = 10
) -> Iterator[Problem]:
    """Yield distinct problems, uniform over the number of operations, digits and operators.

    Args:
        min_operations: at least 1.
        max_operations: inclusive.
        seed: the same seed yields the same problems.
        modulus: of the results.

    Yields:
        Problems, each once, until all were drawn.
    """
    rng = random.Random(seed)
    seen: set[Problem] = set()
    counts = range(min_operations, max_operations + 1)
    possible = sum(10 ** (count + 1) * len(OPERATIONS) ** count for count in counts)
    while len(seen) < possible:
        count = rng.randint(min_operations, max_operations)
        problem = Problem(
            tuple(rng.randrange(10) for _ in range(count + 1)),
            tuple(rng.choice(tuple(OPERATIONS)) for _ in range(count)),
            modulus,
        )
        if problem not in seen:
            seen.add(problem)
            yield problem
