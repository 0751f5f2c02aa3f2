"""SampleCache: completions of evaluations in files, so that none is sampled twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import count
from pathlib import Path
from time import monotonic

import torch
from torch import Tensor

from prl_lightning.runs.tables import read_table, write_table
from prl_lightning.sampling.base import Progress, Sampler, SamplingConfig
from prl_lightning.types import Completion, Prompt

Check = Callable[[list[list[Completion]], list[Prompt]], None]

ENTRIES = 4096  # hashed per tensor; an update changes nearly all, so these identify the weights
PART = 2048  # completions per call of the engine; one without on_progress can lose as many
WRITE_SECONDS = 60.0  # a killed process loses the groups that were finished since the last write


def fingerprint(
    weights: Iterator[tuple[str, Tensor]],
    sampler: Sampler,
    config: SamplingConfig,
    environments: str = "",
) -> str:
    """Hash what completions depend on besides the prompt: weights, engine and settings.

    Args:
        weights: of the policy; iterating is a collective under FSDP.
        sampler: the engine.
        config: of the sampling.
        environments: what they are and their limits, if there are any.
    """
    digest = hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode())
    digest.update((sampler.identity() + environments).encode())
    for name, tensor in weights:
        some = tensor.detach().flatten()[:: max(1, tensor.numel() // ENTRIES)]
        digest.update(name.encode())
        digest.update(some.float().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


class SampleCache:
    """Completions of one fingerprint, in Parquet files that all ranks write.

    Args:
        folder: of this fingerprint.
        rank: of this process; part of the names of its files.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder = folder
        self.rank = rank
        self._groups: dict[str, list[Completion]] = {}
        for file in sorted(folder.glob("part-*.parquet")):
            groups: dict[str, list[Completion]] = {}
            for row in read_table(file):
                prompt = row.pop("prompt")
                messages = json.loads(row.pop("messages", "[]"))  # of any form: a text to Parquet
                completion = Completion(**row, messages=messages)
                groups.setdefault(prompt, []).append(completion)
            # Two concurrent evaluations may both have sampled a prompt; keep one group.
            self._groups.update(groups)

    def __contains__(self, prompt: Prompt) -> bool:
        """Return whether the prompt's completions are cached."""
        return prompt_key(prompt) in self._groups

    def __getitem__(self, prompt: Prompt) -> list[Completion]:
        """Return the completions of a prompt."""
        return self._groups[prompt_key(prompt)]

    def add(self, prompts: Sequence[Prompt], groups: Sequence[list[Completion]]) -> None:
        """Write completions to a new file.

        Args:
            prompts: at least one.
            groups: completions of each prompt.
        """
        keys = [prompt_key(prompt) for prompt in prompts]
        rows = [
            {"prompt": key, **asdict(completion), "messages": json.dumps(completion.messages)}
            for key, group in zip(keys, groups, strict=True)
            for completion in group
        ]
        files = (self.folder / f"part-{self.rank:05d}-{number:05d}.parquet" for number in count())
        write_table(next(file for file in files if not file.exists()), rows)
        self._groups.update(zip(keys, groups, strict=True))

    @contextmanager
    def keeping(
        self, prompts: Sequence[Prompt], check: Check | None, on_progress: Progress
    ) -> Iterator[Progress]:
        """Add groups as they are sampled; those that are finished survive an interruption.

        Args:
            prompts: that are sampled.
            check: raises an error for groups that must not be kept; None keeps all.
            on_progress: called with everything that the yielded one is called with.

        Yields:
            The ``on_progress`` of ``Sampler.generate``.
        """
        pending: dict[int, list[Completion]] = {}
        written = monotonic()

        def write() -> None:
            nonlocal written
            if pending:
                self.add([prompts[row] for row in pending], list(pending.values()))
            pending.clear()
            written = monotonic()

        def keep(finished: Mapping[int, list[Completion]], tokens: int) -> None:
            if check is not None:
                check(list(finished.values()), [prompts[row] for row in finished])
            pending.update(finished)
            if monotonic() - written >= WRITE_SECONDS:
                write()
            on_progress(finished, tokens)

        try:
            yield keep
        finally:
            write()


def prompt_key(prompt: Prompt) -> str:
    """Hash what the completions of a prompt depend on: its tokens and its seed."""
    text = json.dumps([prompt.token_ids, prompt.seed])
    return hashlib.sha256(text.encode()).hexdigest()[:32]
