"""What credit.py measures: slips by their definition, and the figures on values that are known."""

from __future__ import annotations

import random

import pandas as pd
import pytest
import torch

from credit import judge, lines_of, quantities
from credit_report import table
from prl_lightning.arithmetic.problems import Problem
from study import TASK

pytestmark = pytest.mark.process


def tokens_of(text: str) -> list[str]:
    r"""One token per character, and one for the start of the box."""
    before, box, after = text.partition("\\boxed{")
    return [*before, *([box] if box else []), *after]


def slips(prompt: str, text: str) -> list[bool]:
    return [line.is_slip for line in lines_of(prompt, tokens_of(text))]


def test_a_slip_is_judged_by_the_line_before_it() -> None:
    """Modulo 100: a wrong result is one slip, and what follows from it is right."""
    assert slips("7*8-9?", "7*8=56\n56-9=47\n\\boxed{47}") == [False, False, False]
    assert slips("7*8-9?", "7*8=54\n54-9=45\n\\boxed{45}") == [True, False, False]
    assert slips("7*8-9?", "7*8=56\n55-9=46\n\\boxed{46}") == [False, True, False]  # copied wrongly
    assert slips("7*8-9?", "7*8=56\n56-8=48\n\\boxed{48}") == [False, True, False]  # another digit
    assert slips("7*8-9?", "7*8=56\n56-9=47\n\\boxed{46}") == [False, False, True]
    assert slips("1-9*3?", "1-9=92\n92*3=76\n\\boxed{76}") == [False, False, False]
    assert slips("7*8-9?", "7*8=56\n\\boxed{56}") == [False, True]  # a step too few
    assert slips("7*8-9?", "7*8=\n56-9=47\n\\boxed{47}") == [True]  # nothing to go on from


def test_every_written_error_is_found() -> None:
    """Traces with errors come from another piece of code, which is told how often to err."""
    rng = random.Random(0)
    found = lines = 0
    for _ in range(200):
        problem = Problem(
            tuple(rng.randrange(10) for _ in range(9)), tuple(rng.choices("+-*", k=8)), TASK.modulus
        )
        assert not any(slips(problem.prompt, problem.trace(0.0, rng)))
        of_trace = slips(problem.prompt, problem.trace(0.3, rng))
        assert not of_trace[-1]
        found, lines = found + sum(of_trace), lines + len(of_trace) - 1
    assert lines == 1600
    assert found / lines == pytest.approx(0.3, abs=0.035)  # three standard errors


def test_lines_cover_the_tokens() -> None:
    tokens = tokens_of("7*8=56\n56-9=47\n\\boxed{47}")
    covered = [token for line in lines_of("7*8-9?", tokens) for token in tokens[line.tokens]]
    assert covered == tokens


def test_the_drop_is_the_policys_loss_of_trust() -> None:
    """By hand: the drop is log π_ref - log π, the advantage's term its sum over the rest."""
    policy, reference = torch.tensor([-1.0, -3.0, -0.5]), torch.tensor([-2.0, -1.0, -0.5])
    found = quantities(policy, reference, torch.tensor([0.1, 0.2, 0.3]))
    torch.testing.assert_close(found["process reward's drop"], torch.tensor([-1.0, 2.0, 0.0]))
    torch.testing.assert_close(found["low advantage"], torch.tensor([-1.0, -2.0, 0.0]))
    assert sorted(found["shuffled drop"].tolist()) == [-1.0, 0.0, 2.0]
    torch.testing.assert_close(found["policy's surprisal"], torch.tensor([1.0, 3.0, 0.5]))


def test_judged_by_pairs() -> None:
    """Slips 3 and 1 against right lines 2 and 1: above, above, below, equal."""
    scores = torch.tensor([3.0, 2.0, 1.0, 1.0])
    assert judge(scores, torch.tensor([True, False, True, False])) == (2.5 / 4, 1.0)
    assert judge(torch.zeros(4), torch.tensor([True, False, False, False])) == (0.5, 0.25)


def test_the_table_is_of_the_last_iteration_and_over_seeds() -> None:
    """0.8 and 0.6: mean 0.7, and Student's t of one degree of freedom times 0.1."""
    run = {"method": "frpo", "beta": 0.03, "completions_of": "own", "quantity": "entropy"}
    rows = [
        run | {"seed": seed, "iteration": iteration, "auroc": auroc, "hit@1": 0.5, "chance": 0.2}
        for seed, iteration, auroc in ((1, 10, 0.1), (1, 30, 0.8), (2, 30, 0.6))
    ]
    (line,) = table(pd.DataFrame(rows)).splitlines()[2:]
    assert line == ("| own | frpo | 0.03 | 2 | entropy | 0.700 ± 1.271 | 0.500 ± 0.000 | 0.200 |")
