"""What credit.py and credit_real.py measure: slips by definition, figures on known values."""

from __future__ import annotations

import random

import pandas as pd
import pytest
import torch

from claims import claims_of
from credit import lines_of
from credit_report import table
from judging import Judge, Problems, Step, judge, quantities
from prl_lightning.arithmetic.problems import Problem
from prl_lightning.sampling import HFSampler
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


@pytest.mark.parametrize(
    ("text", "claims"),
    [
        ("5 * 9 = 45", {"45": False}),
        ("5 x 9 = 4", {"4": True}),
        ("1. 98 × 93 = 8,562.\n2. 2+3*4 = 14", {"8,562": True, "14": False}),
        ("12 = 2 * 6 = 3 * 4, and 1 − 4 = -3", {"2 * 6 = 3 * 4": False, "-3": False}),
        ("20 = 2 * 5 * 2 = 10", {"2 * 5 * 2 = 10": True}),
        ("7 + 5 = 12 + 1 = 13", {"12 + 1 = 13": True}),
        ("3 * 2 = 3 x 2 = 3 · 2 = 6, then 12 + 12 = 2 x 12", {"3 x 2 = 3 · 2 = 6": 0, "2 x 12": 0}),
        ("5 + 3 = 8\n- 2 * 3 = 6\n-2 * 3 = 6", {"8": False, " 6": False, "6": True}),
        ("**3 * 14 = 42** (really)\n\\(2 + 2 = 5\\)", {"42": False, "5": True}),
        ("5 * 9 = 45\n\n**Answer: 45**\n(5 + 4 = 9)", {"45": False, "9": False}),
        ("The GCD of 18 and 12 is **6**", {"6": False}),
        ("GCD(12, 18) = 4. Greatest common divisor (GCD) of 1,000 and 12: ", {"4": True}),
        ("the greatest common factor of the two numbers 8 and 12 is 4 (no more)", {"4": False}),
        # Parts of expressions with more in them, of numbers that are not whole, or of words:
        ("x + 3 * 4 = 13 and (2 + 3) * 4 = 20; 3y + 2 = 5; a - 3 * 4 = 12", {}),
        ("0.5 * 3 = 1.5, 6 / 3 * 2 = 4, 5 * 3 = 15.5, 98 * 93 = 9 114, 98 + 2 = 100%", {}),
        ("10 ÷ 2 + 1 = 6, 5 + 7 = 24 ÷ 2, 3 \\div 3 + 1 = 2, 2^3 + 1 = 9", {}),
        ("17 = 5 * 3 remainder 2, 10 mod 3 + 1 = 2, 12 : 3 + 1 = 5", {}),
        ("Step 1 - 98 * 93 = 9114", {}),
        ("The answer is 45 = 45, as 74 * 95 = 74 * 95", {}),  # nothing is claimed
        ("The GCD of 18, 12 and 6 is 6, of 18 and 12 is 3 * 2; 18 and 12 is 30", {}),
        ("the lcm, not the gcd, of 12 and 18 is 36, the product of the GCD of 4 and 2 is 8", {}),
        ("GCD of 18 and 12 is 2 * 3 = 6, GCD of 18 and 12 = 6 = 2 * 3", {}),
    ],
)
def test_claims_are_found_and_checked(text: str, claims: dict[str, bool]) -> None:
    steps = claims_of("", list(text))
    assert sorted(text[s.tokens].strip() for s in steps) == sorted(map(str.strip, claims))
    assert sorted(s.is_slip for s in steps) == sorted(map(bool, claims.values()))


@pytest.mark.parametrize("compares_completions", [False, True])
def test_steps_are_compared_within_completions_or_over_a_problem(
    tied_model: str, compares_completions: bool
) -> None:
    """Three completions of two steps: both slips, both right, one each."""
    slips = [(True, True), (False, False), (False, True)]
    completions = [torch.tensor([7 + row, 9, 8, 5 + row, 1]) for row in range(3)]
    read = iter(slips)

    def steps_of(prompt: str, tokens: list[str]) -> list[Step]:
        assert len(tokens) == 4
        first, second = next(read)
        return [Step(slice(0, 2), first), Step(slice(2, 4), second)]

    asked = Problems(["3+5="], steps_of, 1, 0.5, 4, compares_completions)
    judge_of = Judge(tied_model, asked, HFSampler(batch_size=4))
    judged = judge_of.judge([completions])
    surprisal = []
    for completion in completions:
        ids = torch.cat([torch.tensor(judge_of.ids[0]), completion])
        logprobs = (judge_of.model(ids[None]).logits[0] / 0.5).log_softmax(-1)
        of_tokens = -logprobs[:-1].gather(1, ids[1:, None])[-5:, 0]
        surprisal.append((of_tokens[:2].mean(), of_tokens[2:4].mean()))
    kept = range(3) if compares_completions else [2]
    values = [(slip, x) for k in kept for slip, x in zip(slips[k], surprisal[k], strict=True)]
    pairs = [x > y for is_slip, x in values for right, y in values if is_slip and not right]
    assert judged.completions == len(kept)
    assert judged.chance == [0.5]
    [(auroc, _)] = (found.tolist() for found in judged.found["policy's surprisal"])
    assert auroc == pytest.approx(sum(pairs) / len(pairs))
