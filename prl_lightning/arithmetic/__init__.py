"""A small reasoning problem for a laptop; tests, the study and benchmarks use it."""

from prl_lightning.arithmetic.prepare import ArithmeticTask, GuessingTask, SumsTask
from prl_lightning.arithmetic.problems import Problem, draw_problems
from prl_lightning.arithmetic.tokenizer import make_tokenizer

__all__ = [
    "ArithmeticTask",
    "GuessingTask",
    "Problem",
    "SumsTask",
    "draw_problems",
    "make_tokenizer",
]
