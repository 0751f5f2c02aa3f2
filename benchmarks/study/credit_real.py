"""Which quantity finds the wrong claim of a real model? credit.py's question of real.py's runs.

    python benchmarks/study/real.py           # leaves checkpoints after 10 and 20 iterations
    python benchmarks/study/credit_real.py    # rows of credit_real.csv that are missing; the report
    python benchmarks/study/credit_real.py --report

A real model's steps are what it wishes to write. What can be checked are its equations, such as
"3 * 14 = 42", and claims such as "the GCD of 8 and 12 is 4": wrong ones are slips, at the tokens
behind the equals sign or "is". A completion rarely has two, so they are compared over the
completions of a problem. The problems are those of the evaluation, of the level of the training.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoTokenizer

from claims import claims_of
from credit_report import report
from judging import Judge, Problems, checkpoints_of, judge_checkpoints
from prl_lightning.data import ReasoningGym
from prl_lightning.data.gym_tasks import GymTask
from prl_lightning.sampling import VLLMSampler
from real import RealRun, plan
from study import RUNS

RESULTS = Path(__file__).parent / "credit_real.csv"
METHODS = ("grpo", "grpo-kl-loss", "frpo")
SAMPLES = 16


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
    """The checkpoints of real.py's runs of METHODS; the last ones, of which the table is, first."""
    runs = (run for run in plan() if run.method in METHODS)
    found = [one for run in runs for one in checkpoints_of(run, RUNS)]
    yield from sorted(found, key=lambda one: -one[0]["iteration"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--report", action="store_true", help="no further rows")
    if not parser.parse_args().report:
        judge_checkpoints(Judge(*problems(), VLLMSampler()), checkpoints(), RESULTS)
    report(RESULTS)


if __name__ == "__main__":
    main()
