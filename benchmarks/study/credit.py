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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from credit_report import report
from prl_lightning.arithmetic.problems import ANSWER_CLOSES, ANSWER_OPENS, OPERATIONS
from prl_lightning.functional import process_rewards, process_term, token_logprobs
from prl_lightning.functional.bootstrap import bootstrap_interval
from prl_lightning.sampling import HFSampler
from prl_lightning.sampling.base import SamplingConfig
from prl_lightning.types import Prompt
from study import RUNS, TASK, Run, append, named_rows

HERE = Path(__file__).parent
RESULTS, EXAMPLE = HERE / "credit.csv", HERE / "credit_example.json"
SAMPLES, MAX_NEW_TOKENS = 16, 144
NAMED = ("method", "beta", "seed", "iteration")
OF_EXAMPLE = {"method": "frpo", "beta": "0.03", "seed": "5", "iteration": 30}


@dataclass(frozen=True)
class Line:
    """A line of a completion.

    Attributes:
        tokens: of the completion, the line's end included.
        is_slip: it is not what the lines before it ask for.
    """

    tokens: slice
    is_slip: bool


def lines_of(prompt: str, tokens: list[str]) -> list[Line]:
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
        lines.append(Line(slice(start, end), written != expected))
        value = written.rpartition("=")[2]
        if is_answer or not value.isdecimal():
            break
        start, place = end, place + 2
    return lines


def quantities(policy: Tensor, reference: Tensor, entropy: Tensor) -> dict[str, Tensor]:
    """Each quantity at each token of one completion, higher where it suspects a slip.

    Args:
        policy: log-probabilities of the tokens, (T,).
        reference: the same of the reference, (T,).
        entropy: of the policy, (T,).
    """
    delta, mask = (policy - reference)[None], torch.ones(1, len(policy), dtype=torch.bool)
    rewards = process_rewards(torch.zeros(1), delta, mask, beta=1.0)[0]
    whole = -delta.sum()[None]  # of the empty prefix
    return {
        "process reward's drop": torch.cat([whole, rewards[:-1]]) - rewards,
        "shuffled drop": -process_term(delta, mask, discount=0.0, shape="shuffled")[0],
        "low advantage": process_term(delta, mask)[0],
        "policy's surprisal": -policy,
        "reference's surprisal": -reference,
        "policy's entropy": entropy,
    }


def judge(scores: Tensor, is_slip: Tensor) -> tuple[float, float]:
    """Whether scores find the slips among the lines of one completion.

    Args:
        scores: (L,).
        is_slip: bool (L,), neither nowhere nor everywhere true.

    Returns:
        AUROC: the probability that a slip is above a right line, with one half for equal scores.
        hit@1: whether the highest line is a slip; a share where several are highest.

    Example:
        >>> judge(torch.tensor([1.0, 3.0, 2.0]), torch.tensor([True, False, True]))
        (0.0, 0.0)
    """
    above = scores[is_slip][:, None] - scores[~is_slip][None]
    auroc = ((above > 0).double() + (above == 0).double() / 2).mean()
    return float(auroc), float(is_slip[scores == scores.max()].double().mean())


@torch.no_grad()
def per_token_values(model: PreTrainedModel, prompt: Tensor, completions: list[Tensor]) -> Any:
    """Log-probabilities and entropies of completions of one prompt, lists of (T,)."""
    rows = pad_sequence([torch.cat([prompt, row]) for row in completions], batch_first=True)
    targets = rows[:, len(prompt) :]
    hidden = model.base_model(rows).last_hidden_state[:, len(prompt) - 1 : -1]
    head = model.get_output_embeddings().weight
    values = token_logprobs(hidden.flatten(0, 1), head, targets.flatten())
    return tuple(
        [row[: len(own)] for row, own in zip(x.view_as(targets), completions, strict=True)]
        for x in values
    )


@dataclass
class Judged:
    """What one checkpoint's quantities find in completions of all problems.

    Attributes:
        found: by quantity, AUROC and hit@1 of each problem's completions.
        chance: share of slips among the lines, by completion.
        completions: number of them.
    """

    found: dict[str, list[Tensor]]
    chance: list[float]
    completions: int

    def rows(self) -> Iterator[dict[str, Any]]:
        """A row for each quantity, with 95% bootstrap intervals over problems."""
        for name, of_problems in self.found.items():
            values = torch.stack(of_problems)
            (low, low_hit), (high, high_hit) = bootstrap_interval(values).tolist()
            auroc, hit = values.mean(0).tolist()
            figures = {
                "auroc": auroc, "auroc_low": low, "auroc_high": high,
                "hit@1": hit, "hit@1_low": low_hit, "hit@1_high": high_hit,
                "chance": sum(self.chance) / len(self.chance),
            }  # fmt: skip
            rounded = {key: round(value, 4) for key, value in figures.items()}
            yield {"quantity": name, **rounded, "completions": self.completions}


class Judge:
    """The base model, the held-out problems, and the base model's own completions of them."""

    def __init__(self) -> None:
        base = f"{TASK.folder}/base"
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self.base, self.model = (
            AutoModelForCausalLM.from_pretrained(base).eval() for _ in range(2)
        )
        rows = (Path(TASK.folder) / "heldout.jsonl").read_text().splitlines()
        self.problems = [json.loads(row)["prompt"] for row in rows]
        self.sampler = HFSampler(batch_size=512)
        self.sampler.start(base, 2 * MAX_NEW_TOKENS)
        self.of_base = self.sample()

    def sample(self) -> list[list[Tensor]]:
        """Completions of each problem by ``model`` that end by themselves, as token ids."""
        self.sampler.load_weights(self.model.state_dict().items())
        stop = self.tokenizer.eos_token_id
        config = SamplingConfig(SAMPLES, 1.0, MAX_NEW_TOKENS, (stop,))
        prompts = [
            Prompt(self.tokenizer(text)["input_ids"], text, seed=SAMPLES * number)
            for number, text in enumerate(self.problems)
        ]
        groups = self.sampler.generate(prompts, config)
        return [[torch.tensor(c.token_ids) for c in g if c.finished] for g in groups]

    def load(self, checkpoint: Path) -> None:
        """Take the weights of a run's checkpoint."""
        state = torch.load(checkpoint, weights_only=True)["state_dict"]
        prefix = "policy.causal_lm."
        self.model.load_state_dict(
            {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        )

    def judge(self, groups: list[list[Tensor]]) -> Judged:
        """Judge the wrong completions of every problem by ``model``'s quantities."""
        judged = Judged({}, [], 0)
        for prompt, completions in zip(self.problems, groups, strict=True):
            kept = [(c, found) for c in completions if (found := self.slips(prompt, c))]
            if not kept:
                continue
            of_problem: dict[str, list[tuple[float, float]]] = {}
            values = self.values(prompt, [completion for completion, _ in kept])
            for (_, lines), of_tokens in zip(kept, values, strict=True):
                is_slip = torch.tensor([line.is_slip for line in lines])
                judged.chance.append(float(is_slip.double().mean()))
                for name, scores in of_tokens.items():
                    of_lines = torch.stack([scores[line.tokens].mean() for line in lines])
                    of_problem.setdefault(name, []).append(judge(of_lines, is_slip))
            judged.completions += len(kept)
            for name, found in of_problem.items():
                judged.found.setdefault(name, []).append(torch.tensor(found).mean(0))
        return judged

    def values(self, prompt: str, completions: list[Tensor]) -> list[dict[str, Tensor]]:
        """The quantities at each token of each completion."""
        ids = torch.tensor(self.tokenizer(prompt)["input_ids"])
        policy, entropy = per_token_values(self.model, ids, completions)
        reference, _ = per_token_values(self.base, ids, completions)
        return [quantities(*of_one) for of_one in zip(policy, reference, entropy, strict=True)]

    def example(self, groups: list[list[Tensor]]) -> dict[str, Any]:
        """The first completion with one slip: each token with ``model``'s quantities."""
        for prompt, completions in zip(self.problems, groups, strict=True):
            for completion in completions:
                slips = [line.tokens for line in self.slips(prompt, completion) if line.is_slip]
                if len(slips) != 1:
                    continue
                (values,) = self.values(prompt, [completion])
                return {
                    "prompt": prompt,
                    "tokens": self.texts(completion),
                    "slips": [[tokens.start, tokens.stop] for tokens in slips],
                    "quantities": {k: [round(x, 4) for x in v.tolist()] for k, v in values.items()},
                }
        raise RuntimeError("no completion has exactly one slip")

    def texts(self, completion: Tensor) -> list[str]:
        """Its tokens as text, without the end of the sequence."""
        return self.tokenizer.batch_decode(completion[:-1, None])

    def slips(self, prompt: str, completion: Tensor) -> list[Line]:
        """The lines of a completion that has slips and right lines; else none."""
        lines = lines_of(prompt, self.texts(completion))
        return lines if 0 < sum(line.is_slip for line in lines) < len(lines) else []


def checkpoints() -> Iterator[tuple[dict[str, Any], Path]]:
    """The checkpoints of all finished runs, with the columns that name them."""
    with (HERE / "results.csv").open(newline="") as rows:
        for row in csv.DictReader(rows):
            run = Run(row["method"], float(row["beta"]), row["steps"], int(row["seed"]))
            named = {key: row[key] for key in ("method", "beta", "seed")}
            for file in sorted((RUNS / run.name).glob("version_*/checkpoints/epoch=*.ckpt")):
                iteration = int(file.stem.partition("=")[2].partition("-")[0]) + 1
                yield named | {"iteration": iteration}, file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--report", action="store_true", help="no further rows")
    if not parser.parse_args().report:
        done = named_rows(RESULTS, NAMED)
        judge_of = Judge()
        for named, file in checkpoints():
            if tuple(map(str, named.values())) in done:
                continue
            judge_of.load(file)
            own = judge_of.sample()
            for whose, groups in (("own", own), ("base", judge_of.of_base)):
                rows = judge_of.judge(groups).rows()
                append(RESULTS, [named | {"completions_of": whose} | row for row in rows])
            if named == OF_EXAMPLE:
                EXAMPLE.write_text(json.dumps(judge_of.example(own)))
            print(named, flush=True)
    report(RESULTS, EXAMPLE, HERE)


if __name__ == "__main__":
    main()
