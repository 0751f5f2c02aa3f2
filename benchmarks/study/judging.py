"""Which quantity of a token finds wrong steps? What credit.py and credit_real.py share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from prl_lightning.functional import process_rewards, process_term, token_logprobs
from prl_lightning.functional.bootstrap import bootstrap_interval
from prl_lightning.sampling import Sampler, SamplingConfig
from prl_lightning.types import Prompt
from study import Run, append, named_rows

NAMED = ("method", "beta", "seed", "iteration")


@dataclass(frozen=True)
class Step:
    """A step of a completion that can be checked.

    Attributes:
        tokens: of the completion.
        is_slip: it is wrong.
    """

    tokens: slice
    is_slip: bool


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
    """Whether scores find the slips among some steps.

    Args:
        scores: (L,).
        is_slip: bool (L,), neither nowhere nor everywhere true.

    Returns:
        AUROC: the probability that a slip is above a right step, with one half for equal scores.
        hit@1: whether the highest step is a slip; a share where several are highest.

    Example:
        >>> judge(torch.tensor([1.0, 3.0, 2.0]), torch.tensor([True, False, True]))
        (0.0, 0.0)
    """
    above = scores[is_slip][:, None] - scores[~is_slip][None]
    auroc = ((above > 0).double() + (above == 0).double() / 2).mean()
    return float(auroc), float(is_slip[scores == scores.max()].double().mean())


@torch.no_grad()
def per_token_values(
    model: PreTrainedModel, prompt: Tensor, completions: Sequence[Tensor], temperature: float
) -> Any:
    """Log-probabilities and entropies of completions of one prompt, lists of (T,)."""
    targets = pad_sequence(list(completions), batch_first=True)
    of_prompt = model.base_model(prompt[None], use_cache=True)
    of_prompt.past_key_values.batch_repeat_interleave(len(targets))
    rest = model.base_model(targets[:, :-1], past_key_values=of_prompt.past_key_values)
    first = of_prompt.last_hidden_state[:, -1:].expand(len(targets), -1, -1)
    hidden = torch.cat([first, rest.last_hidden_state], dim=1)
    head = model.get_output_embeddings().weight
    values = token_logprobs(hidden.flatten(0, 1), head, targets.flatten(), temperature)
    return tuple(
        [row[: len(own)] for row, own in zip(x.view_as(targets), completions, strict=True)]
        for x in values
    )


@dataclass
class Judged:
    """What one checkpoint's quantities find in completions of all problems.

    Attributes:
        found: by quantity, AUROC and hit@1 of each problem's completions.
        chance: share of slips among the steps that are compared.
        completions: number of them.
    """

    found: dict[str, list[Tensor]] = field(default_factory=dict)
    chance: list[float] = field(default_factory=list)
    completions: int = 0

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


@dataclass(frozen=True)
class Problems:
    """What is asked, and how answers are read.

    Attributes:
        prompts: as the model reads them.
        steps_of: the steps of a completion, given its prompt and its tokens as text.
        samples: of each prompt.
        temperature: of sampling, and of the probabilities.
        max_new_tokens: of a completion; longer ones are left out.
        compares_completions: a problem's steps are compared over its completions; otherwise those
            of each completion by themselves.
    """

    prompts: Sequence[str]
    steps_of: Callable[[str, list[str]], list[Step]]
    samples: int
    temperature: float
    max_new_tokens: int
    compares_completions: bool = False


# A completion's steps, and each quantity of them, (steps,).
Scored = tuple[list[Step], dict[str, Tensor]]


class Judge:
    """A base model, problems, and the base model's own completions of them.

    Args:
        base: folder of the model.
        problems: what is asked.
        sampler: starts with the base model, and takes each checkpoint's weights.
    """

    def __init__(self, base: str, problems: Problems, sampler: Sampler) -> None:
        self.problems = problems
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self.base, self.model = (
            AutoModelForCausalLM.from_pretrained(base).eval() for _ in range(2)
        )
        self.ids = [
            self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in problems.prompts
        ]
        self.sampler = sampler
        self.sampler.start(base, max(map(len, self.ids)) + problems.max_new_tokens)
        self.of_base = self.sample()
        self.known: dict[Any, list[Tensor]] = {}

    def sample(self) -> list[list[Tensor]]:
        """Completions of each problem by ``model`` that end by themselves, as token ids."""
        asked = self.problems
        self.sampler.load_weights(self.model.state_dict().items())
        stop = (self.tokenizer.eos_token_id,)
        config = SamplingConfig(asked.samples, asked.temperature, asked.max_new_tokens, stop)
        prompts = [
            Prompt(ids, text, seed=asked.samples * number)
            for number, (ids, text) in enumerate(zip(self.ids, asked.prompts, strict=True))
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
        """Judge completions of every problem by ``model``'s quantities."""
        judged = Judged()
        for number, completions in enumerate(groups):
            of_problem: dict[str, list[tuple[float, float]]] = {}
            for compared in self.scored(number, completions):
                slips = torch.tensor([s.is_slip for steps, _ in compared for s in steps])
                for name in compared[0][1]:
                    scores = torch.cat([of_steps[name] for _, of_steps in compared])
                    of_problem.setdefault(name, []).append(judge(scores, slips))
                judged.chance.append(float(slips.double().mean()))
                judged.completions += len(compared)
            for name, found in of_problem.items():
                judged.found.setdefault(name, []).append(torch.tensor(found).mean(0))
        return judged

    def scored(self, number: int, completions: list[Tensor]) -> Iterator[list[Scored]]:
        """Yield the completions of a problem whose steps are compared with each other.

        Each quantity is a mean over a step. Where no step is a slip, or none is right, there is
        nothing to compare, and nothing is computed.
        """
        prompt = self.problems.prompts[number]
        read = [(c, self.problems.steps_of(prompt, self.texts(c))) for c in completions]
        together = [read] if self.problems.compares_completions else [[one] for one in read]
        mixed = [
            [(completion, steps) for completion, steps in some if steps]
            for some in together
            if len({step.is_slip for _, steps in some for step in steps}) == 2
        ]
        values = iter(self.values(number, [c for some in mixed for c, _ in some]))
        for some in mixed:
            yield [(steps, _of_steps(next(values), steps)) for _, steps in some]

    def values(self, number: int, completions: list[Tensor]) -> list[dict[str, Tensor]]:
        """The quantities at each token of each completion of a problem."""
        if not completions:
            return []
        ids, temperature = torch.tensor(self.ids[number]), self.problems.temperature
        policy, entropy = per_token_values(self.model, ids, completions, temperature)
        asked = number, *(tuple(completion.tolist()) for completion in completions)
        if asked not in self.known:  # its own completions are judged again for each checkpoint
            self.known[asked], _ = per_token_values(self.base, ids, completions, temperature)
        reference = self.known[asked]
        return [quantities(*of_one) for of_one in zip(policy, reference, entropy, strict=True)]

    def texts(self, completion: Tensor) -> list[str]:
        """Its tokens as text, without the end of the sequence.

        A character of several tokens is that of the last one: by itself none can be read.
        """
        ids = completion[:-1].tolist()
        read = [self.tokenizer.decode(ids[:end]).rstrip("\ufffd") for end in range(len(ids) + 1)]
        return [longer[len(text) :] for text, longer in pairwise(read)]


def _of_steps(values: dict[str, Tensor], steps: list[Step]) -> dict[str, Tensor]:
    return {k: torch.stack([v[step.tokens].mean() for step in steps]) for k, v in values.items()}


def checkpoints_of(run: Run, folder: Path) -> Iterator[tuple[dict[str, Any], Path]]:
    """The checkpoints of a run's newest version, with the columns that name them."""
    named = {"method": run.method, "beta": str(run.beta), "seed": str(run.seed)}
    versions = sorted((folder / run.name).glob("version_*/checkpoints"), key=os.path.getmtime)
    for file in sorted(versions[-1].glob("epoch=*.ckpt")) if versions else ():
        iteration = int(file.stem.partition("=")[2].partition("-")[0]) + 1
        yield named | {"iteration": iteration}, file


def judge_checkpoints(
    judge_of: Judge,
    checkpoints: Iterable[tuple[dict[str, Any], Path]],
    results: Path,
    then: Callable[[dict[str, Any], list[list[Tensor]]], None] = lambda named, own: None,
) -> None:
    """Judge the checkpoints that a CSV lacks, in their own completions and in the base model's.

    Args:
        judge_of: holds base model and problems.
        checkpoints: names and files.
        results: the CSV.
        then: is called with each checkpoint's name and its own completions.
    """
    done = named_rows(results, NAMED)
    for named, file in checkpoints:
        if tuple(map(str, named.values())) in done:
            continue
        judge_of.load(file)
        own = judge_of.sample()
        rows = [
            named | {"completions_of": whose} | row
            for whose, groups in (("own", own), ("base", judge_of.of_base))
            for row in judge_of.judge(groups).rows()
        ]
        if rows:  # at once: a checkpoint in the file is not judged again
            append(results, rows)
        then(named, own)
        print(named, flush=True)
