"""Does the process reward find the wrong step? Each quantity that could, where slips are.

    python benchmarks/study/study.py          # makes the checkpoints, three of each run
    python benchmarks/study/credit.py         # rows of credit.csv that are missing, then the report
    python benchmarks/study/credit.py --report

Of a calculation every line can be checked, so it is known which ones are slips. A quantity is a
number for each line, higher where it suspects a slip. It is asked, within a completion: is a slip
above a right line (AUROC), and is the highest line a slip (hit@1)? docs/study.md has what came out.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from credit_report import report
from judging import Judge, Problems, Step, checkpoints_of, judge_checkpoints
from prl_lightning.arithmetic.problems import ANSWER_CLOSES, ANSWER_OPENS, OPERATIONS
from prl_lightning.sampling import HFSampler
from study import RUNS, TASK, Run

HERE = Path(__file__).parent
RESULTS, EXAMPLE = HERE / "credit.csv", HERE / "credit_example.json"
SAMPLES, MAX_NEW_TOKENS = 16, 144
OF_EXAMPLE = {"method": "frpo", "beta": "0.03", "seed": "5", "iteration": 30}


def lines_of(prompt: str, tokens: list[str]) -> list[Step]:
    r"""Check the lines of a calculation, each on the ground of what the one before it says.

    Args:
        prompt: such as "3+5*2?".
        tokens: of the completion as text, without the end of the sequence.

    Returns:
        The lines up to the answer; up to a line without a result, if there is one.

    Example:
        >>> [line.is_slip for line in lines_of("3+5*2?", [*"3+5=9\n9*2=18\n", "\\boxed{", *"18}"])]
        [True, False, False]
    """
    lines, start, value, place = [], 0, prompt[0], 1
    while start < len(tokens):
        end = tokens.index("\n", start) + 1 if "\n" in tokens[start:] else len(tokens)
        written = "".join(tokens[start:end]).strip()
        is_answer = prompt[place] == "?"
        if is_answer:
            expected = f"{ANSWER_OPENS}{value}{ANSWER_CLOSES}"
        else:
            operator, digit = prompt[place], prompt[place + 1]
            result = OPERATIONS[operator](int(value), int(digit)) % TASK.modulus
            expected = f"{value}{operator}{digit}={result}"
        lines.append(Step(slice(start, end), written != expected))
        value = written.rpartition("=")[2]
        if is_answer or not value.isdecimal():
            break
        start, place = end, place + 2
    return lines


def arithmetic() -> Problems:
    """The study's held-out problems."""
    rows = (Path(TASK.folder) / "heldout.jsonl").read_text().splitlines()
    prompts = [json.loads(row)["prompt"] for row in rows]
    return Problems(prompts, lines_of, SAMPLES, 1.0, MAX_NEW_TOKENS)


def example(judge: Judge, groups: list[list[Tensor]]) -> dict[str, Any]:
    """The first completion with one slip: each token with the policy's quantities."""
    for number, completions in enumerate(groups):
        prompt = judge.problems.prompts[number]
        for completion in completions:
            tokens = judge.texts(completion)
            steps = judge.problems.steps_of(prompt, tokens)
            slips = [step.tokens for step in steps if step.is_slip]
            if len(slips) != 1 or len(steps) == 1:
                continue
            (values,) = judge.values(number, [completion])
            return {
                "prompt": prompt,
                "tokens": tokens,
                "slips": [[tokens.start, tokens.stop] for tokens in slips],
                "quantities": {k: [round(x, 4) for x in v.tolist()] for k, v in values.items()},
            }
    raise RuntimeError("no completion has exactly one slip")


def checkpoints() -> Iterator[tuple[dict[str, Any], Path]]:
    """The checkpoints of all finished runs of study.py, but for those with steps of their own."""
    with (HERE / "results.csv").open(newline="") as rows:
        for row in csv.DictReader(rows):
            run = Run(row["method"], float(row["beta"]), row["steps"], int(row["seed"]))
            if not run.steps:
                yield from checkpoints_of(run, RUNS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--report", action="store_true", help="no further rows")
    if not parser.parse_args().report:
        judge = Judge(f"{TASK.folder}/base", arithmetic(), HFSampler(batch_size=512))

        def keep_example(named: dict[str, Any], own: list[list[Tensor]]) -> None:
            if named == OF_EXAMPLE:
                EXAMPLE.write_text(json.dumps(example(judge, own)))

        judge_checkpoints(judge, checkpoints(), RESULTS, keep_example)
    report(RESULTS, EXAMPLE)


if __name__ == "__main__":
    main()
