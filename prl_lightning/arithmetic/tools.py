"""A calculator for the arithmetic problem, as a tool that the model may call."""

from __future__ import annotations

import re

from prl_lightning.arithmetic.problems import OPERATIONS


def calculate(expression: str) -> int:
    """Compute one operation of the arithmetic problem; results are taken modulo 10.

    Args:
        expression: Two numbers with +, - or * between them.

    Raises:
        ValueError: The expression is something else.

    Example:
        >>> calculate("7*8")
        6
    """
    found = re.fullmatch(r"(\d+)([-+*])(\d+)", expression)
    if found is None:
        raise ValueError(f"{expression!r} is not two numbers with +, - or * between them")
    left, operator, right = found.groups()
    return OPERATIONS[operator](int(left), int(right)) % 10
