r"""Which quantity finds the wrong equation of a real model? credit.py's question of real.py's runs.

    python benchmarks/study/real.py           # leaves checkpoints after 10 and 20 iterations
    python benchmarks/study/credit_real.py    # rows of credit_real.csv that are missing; the report
    python benchmarks/study/credit_real.py --report

A real model's steps are what it wishes to write. What can be checked are its equations, such as
"3 * 14 = 42", and claims such as "the GCD of 8 and 12 is 4": wrong ones are slips. A completion
rarely has two, so they are compared over the completions of a problem. The problems are those of
the evaluation, of the level of the training.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoTokenizer

from credit_report import report
from judging import Judge, Problems, Step, checkpoints_of, judge_checkpoints
from prl_lightning.data import ReasoningGym
from prl_lightning.data.gym_tasks import GymTask
from real import RealRun, plan
from study import RUNS

RESULTS = Path(__file__).parent / "credit_real.csv"
METHODS = ("grpo", "grpo-kl-loss", "frpo")
SAMPLES = 16

NUMBER = r"\d+(?:,\d{3})*"
SIDE = rf"-?{NUMBER}(?:\s*[-+*×]\s*{NUMBER})*"
# No part of a longer number, of a longer expression, or of one with other operators.
EQUATION = re.compile(
    rf"(?<![\w.,/^+*×=-])(?<![/^+*×=-]\s){SIDE}(?:\s*=\s*{SIDE})+(?![.,]?\d|\s*[/^=(*×+-]|\w)"
)

DIVISOR = re.compile(
    rf"(?i)(?:gcd|greatest common (?:divisor|factor))[^.\n\d]*({NUMBER}),? and ({NUMBER}) (?:is|=) "
    rf"({NUMBER})(?![.,]?\d|\s*[-/^=(*×+]|\w)"
)


def value_of(side: str) -> int:
    """The value of a sum of products of whole numbers.

    Example:
        >>> value_of("2 + 3 × 4 - 1,000")
        -986
    """
    terms = re.findall(rf"[-+]?\s*{NUMBER}(?:\s*[*×]\s*{NUMBER})*", side)
    numbers = [[whole(n) for n in re.findall(NUMBER, term)] for term in terms]
    return sum(
        (-1 if term.startswith("-") else 1) * math.prod(factors)
        for term, factors in zip(terms, numbers, strict=True)
    )


def whole(number: str) -> int:
    """A number with or without commas."""
    return int(number.replace(",", ""))


def claims_in(text: str) -> Iterator[tuple[re.Match[str], bool]]:
    """Equations with an operation and greatest common divisors, and whether each is wrong."""
    for match in EQUATION.finditer(text):
        if re.search(r"\d\s*[-+*×]", match[0]):
            yield match, len({value_of(side) for side in match[0].split("=")}) > 1
    for match in DIVISOR.finditer(text):
        first, second, divisor = map(whole, match.groups())
        yield match, math.gcd(first, second) != divisor


def claims_of(prompt: str, tokens: list[str]) -> list[Step]:
    """The claims of a completion that can be checked.

    Args:
        prompt: not used.
        tokens: of the completion as text, without the end of the sequence.

    Example:
        >>> [wrong] = claims_of("", ["3 * 4", " =", " 13", ", I think."])
        >>> wrong.tokens, wrong.is_slip
        (slice(0, 3, None), True)
    """
    ends = list(accumulate(map(len, tokens)))
    steps = []
    for match, is_wrong in claims_in("".join(tokens)):
        first = next(place for place, end in enumerate(ends) if end > match.start())
        last = next(place for place, end in enumerate(ends) if end >= match.end())
        steps.append(Step(slice(first, last + 1), is_wrong))
    return steps


def problems() -> tuple[str, Problems]:
    """The folder of the model, and real.yaml's evaluation of the level of the training."""
    config = yaml.safe_load(RealRun.config.read_text())
    folder, rollout = config["model"]["policy"], config["rollout"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = []
    for name, of_set in config["evaluation"]["sets"].items():
        if name.endswith("-harder"):
            continue
        init = of_set["init_args"]
        tasks = {task: GymTask(**given) for task, given in init["tasks"].items()}
        source = ReasoningGym(**init | {"tasks": tasks})
        for position in range(len(source)):
            message = {"role": "user", "content": source.row(position, 0)["prompt"]}
            prompts.append(
                tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
            )
    sampled = SAMPLES, rollout["temperature"], rollout["max_new_tokens"]
    return folder, Problems(prompts, claims_of, *sampled, compares_completions=True)


def checkpoints() -> Iterator[tuple[dict[str, Any], Path]]:
    """The checkpoints of real.py's runs of METHODS."""
    for run in plan():
        if run.method in METHODS:
            yield from checkpoints_of(run, RUNS)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--report", action="store_true", help="no further rows")
    if not parser.parse_args().report:
        judge_checkpoints(Judge(*problems(), batch_size=128), checkpoints(), RESULTS)
    report(RESULTS)


if __name__ == "__main__":
    main()
