"""The work that is compared: a model made from its sizes, prompts, and lengths that all must draw.

Completions do not end by themselves: how long each is, is given, so that everybody generates and
trains on the same number of tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import string
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from prl_lightning.arithmetic.tokenizer import make_tokenizer
from prl_lightning.rewards import completion_text

# The share of the limit that a completion of lognormal length has on the mean, and its spread.
MEAN_SHARE, SIGMA = 0.35, 0.8


@dataclass(frozen=True)
class Work:
    """Sizes of the model and of an iteration.

    Attributes:
        prompt_tokens: of every prompt.
        lengths: "fixed" (all at the limit) or "lognormal".
    """

    hidden: int = 256
    layers: int = 4
    heads: int = 4
    vocab: int = 64
    group: int = 8
    prompts: int = 16
    prompt_tokens: int = 16
    max_new_tokens: int = 64
    lengths: str = "fixed"

    @property
    def intermediate(self) -> int:
        return 2 * self.hidden

    def completion_lengths(self, epoch: int) -> list[list[int]]:
        """Tokens of every completion of an iteration, by prompt."""
        draw = random.Random(epoch)
        limit = self.max_new_tokens
        if self.lengths == "fixed":
            return [[limit] * self.group for _ in range(self.prompts)]
        mu = math.log(MEAN_SHARE * limit) - SIGMA**2 / 2
        return [
            [min(limit, max(1, round(draw.lognormvariate(mu, SIGMA)))) for _ in range(self.group)]
            for _ in range(self.prompts)
        ]

    def lengths_of_epochs(self) -> Iterator[list[list[int]]]:
        """``completion_lengths`` of one iteration after the other."""
        return map(self.completion_lengths, count())

    def update_flops(self, epoch: int) -> float:
        """Multiply-adds, twice, of reference, forward and backward pass.

        Without padding, a group's prompt once, and no last token, which predicts nothing.
        """
        h, layer = self.hidden, 4 * self.hidden**2 + 3 * self.hidden * self.intermediate
        lengths = [n for group in self.completion_lengths(epoch) for n in group]
        tokens = self.prompts * self.prompt_tokens + sum(n - 1 for n in lengths)
        # Scores and values, the causal half of 2 * tokens^2 * h for each row.
        attention = sum((self.prompt_tokens + n - 1) ** 2 * h for n in lengths)
        total = 2 * self.layers * (tokens * layer + attention) + 2 * sum(lengths) * h * self.vocab
        return 4 * total  # reference and forward once, backward twice


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The sizes, as options."""
    for name, default in vars(Work()).items():
        option = f"--{name.replace('_', '-')}"
        if name == "lengths":
            parser.add_argument(option, default=default, choices=("fixed", "lognormal"))
        else:
            parser.add_argument(option, default=default, type=int)


def work_of(args: argparse.Namespace) -> Work:
    return Work(**{name: getattr(args, name) for name in vars(Work())})


def sizes_of(work: Work) -> list[str]:
    """The options that say this work."""
    return [
        word
        for name, value in vars(work).items()
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]


def make(work: Work, folder: Path, epochs: int) -> None:
    """Write ``model`` and ``prompts.jsonl`` into a folder."""
    tokenizer = make_tokenizer()  # its tokens are the first ones of the model's
    config = Qwen2Config(
        vocab_size=work.vocab,
        hidden_size=work.hidden,
        intermediate_size=work.intermediate,
        num_hidden_layers=work.layers,
        num_attention_heads=work.heads,
        num_key_value_heads=work.heads,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    draw = random.Random(0)
    with (folder / "prompts.jsonl").open("w") as file:
        for _ in range(work.prompts * epochs):
            text = "".join(draw.choices(string.digits, k=work.prompt_tokens))
            file.write(json.dumps({"prompt": text}) + "\n")


def matmul_rate(seconds: float = 0.5, size: int = 1024) -> float:
    """FLOP/s of torch.mm in float32 on this machine now."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    products, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < seconds:
        torch.mm(a, b)
        products += 1
    return 2 * size**3 * products / passed


def reward(completions: Sequence[Any], **columns: object) -> list[float]:
    """Cheap, and different within a group."""
    return [float(zlib.crc32(completion_text(one).encode()) % 5 == 0) for one in completions]
