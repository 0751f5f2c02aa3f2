"""A base model for the arithmetic problem, trained here on traces with errors."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from prl_lightning.arithmetic.problems import Traced
from prl_lightning.runs.progress import bar_or_lines

IGNORED = -100


def trace_batches(
    problems: Sequence[Traced],
    tokenizer: PreTrainedTokenizerBase,
    error_rate: float,
    batch_size: int,
    seed: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (input_ids, labels) forever: random problems, each with a new trace.

    Args:
        problems: to choose from.
        tokenizer: one token per character.
        error_rate: probability that a step of a trace is wrong.
        batch_size: traces per batch.
        seed: of the choice of problems and of the errors.

    Yields:
        (batch_size, S) token ids, and labels that ignore prompt and padding.
    """
    rng = random.Random(seed)
    while True:
        chosen = rng.choices(problems, k=batch_size)
        rows = [
            problem.prompt + problem.trace(error_rate, rng) + tokenizer.eos_token
            for problem in chosen
        ]
        encoded = tokenizer(rows, padding=True, padding_side="right", return_tensors="pt")
        labels = encoded["input_ids"].masked_fill(encoded["attention_mask"] == 0, IGNORED)
        for row, problem in enumerate(chosen):
            labels[row, : len(problem.prompt)] = IGNORED
        yield encoded["input_ids"], labels


def train_base_model(
    problems: Sequence[Traced],
    tokenizer: PreTrainedTokenizerBase,
    error_rate: float = 0.25,
    hidden_size: int = 128,
    layers: int = 3,
    steps: int = 400,
    batch_size: int = 128,
    learning_rate: float = 2e-3,
    seed: int = 0,
) -> Qwen2ForCausalLM:
    """Train a small Qwen2 on traces whose steps are wrong with probability ``error_rate``.

    It learns the format and the distribution of the errors, so some completions of every problem
    are right: reinforcement learning needs this to start.

    Args:
        problems: to learn from.
        tokenizer: one token per character.
        error_rate: probability that a step of a trace is wrong.
        hidden_size: of the model; the size of an attention head is 32.
        layers: of the model.
        steps: optimizer steps.
        batch_size: traces per step.
        learning_rate: maximum of the schedule.
        seed: of the initial weights and the traces.

    Returns:
        The trained model, on the CPU.
    """
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=hidden_size // 32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):  # leaves the random state of the caller alone
        torch.default_generator.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=steps, pct_start=0.05
    )
    batches = islice(trace_batches(problems, tokenizer, error_rate, batch_size, seed), steps)
    with bar_or_lines("Base model", steps) as advance:
        for input_ids, labels in batches:
            optimizer.zero_grad()
            loss = model(input_ids=input_ids, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            advance(1, f"loss {loss.item():.3f}")
    return model
