"""SampleCache: an evaluation's completions, kept so that no work is done twice."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import count
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from prl_lightning.module import PRLModule
from prl_lightning.rollouts.engine_link import EngineLink, Samples
from prl_lightning.runs.progress import sampling_bar
from prl_lightning.runs.tables import read_table, write_table
from prl_lightning.sampling import Sampler, SamplingConfig
from prl_lightning.trainer_access import sum_over_ranks
from prl_lightning.types import Completion, Prompt

ENTRIES = 4096  # of every tensor: an update changes nearly all, so these tell weights apart
PART = 2048  # completions in a file: what an interruption can cost at most


def fingerprint(
    weights: Iterator[tuple[str, Tensor]], sampler: Sampler, config: SamplingConfig
) -> str:
    """What completions depend on beside their prompt: weights, engine and its settings.

    Args:
        weights: of the policy; a collective under FSDP.
        sampler: the engine.
        config: of the sampling.
    """
    digest = hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode())
    digest.update(sampler.identity().encode())
    for name, tensor in weights:
        some = tensor.detach().flatten()[:: max(1, tensor.numel() // ENTRIES)]
        digest.update(name.encode())
        digest.update(some.float().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


class SampleCache:
    """Completions of one model with one setting, in Parquet files that ranks add to.

    Args:
        folder: of this fingerprint.
        rank: of this process, for the names of the files that it writes.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder = folder
        self.rank = rank
        self._groups: dict[str, list[Completion]] = {}
        for file in sorted(folder.glob("part-*.parquet")):
            groups: dict[str, list[Completion]] = {}
            for row in read_table(file):
                completion = Completion(row["token_ids"], row["logprobs"], row["finished"])
                groups.setdefault(row["prompt"], []).append(completion)
            # Two evaluations at once may both have drawn a prompt's: they are not added up.
            self._groups.update(groups)

    def __contains__(self, prompt: Prompt) -> bool:
        """Whether the prompt has its completions."""
        return _key(prompt) in self._groups

    def __getitem__(self, prompt: Prompt) -> list[Completion]:
        """The completions of a prompt."""
        return self._groups[_key(prompt)]

    def add(self, prompts: Sequence[Prompt], groups: Sequence[list[Completion]]) -> None:
        """Keep the completions of some prompts, in a file of their own.

        Args:
            prompts: at least one.
            groups: the completions of each.
        """
        keys = [_key(prompt) for prompt in prompts]
        rows = [
            {"prompt": key, **asdict(completion)}
            for key, group in zip(keys, groups, strict=True)
            for completion in group
        ]
        names = (f"part-{self.rank:05d}-{number:05d}.parquet" for number in count())
        free = next(name for name in names if not (self.folder / name).exists())
        write_table(self.folder / free, rows)
        self._groups.update(zip(keys, groups, strict=True))


def _key(prompt: Prompt) -> str:
    """Equal where an engine would draw the same: of equal tokens and seed."""
    text = json.dumps([prompt.token_ids, prompt.seed])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def draw_kept(
    engine: EngineLink,
    trainer: Trainer,
    module: PRLModule,
    prompts: Sequence[Prompt],
    config: SamplingConfig,
    max_model_tokens: int,
) -> Samples:
    """Draw what no earlier evaluation of the same weights has drawn, and keep it part by part.

    An interrupted evaluation goes on where it was, and one with other rewards samples nothing. They
    lie in ``samples`` under ``trainer.default_root_dir``.

    Args:
        engine: gets the weights if any rank needs it.
        trainer: knows folder and ranks.
        module: has the weights.
        prompts: of this rank.
        config: of the sampling.
        max_model_tokens: the longest prompt and completion.
    """
    start = time.monotonic()
    name = fingerprint(module.weights(), engine.sampler, config)
    store = SampleCache(Path(trainer.default_root_dir) / "samples" / name, trainer.global_rank)
    missing = [prompt for prompt in prompts if prompt not in store]
    if len(missing) < len(prompts):
        found = (len(prompts) - len(missing)) * config.n
        rank_zero_info(f"{found} completions are in {store.folder} and not drawn again.")
    if sum_over_ranks(trainer, torch.tensor([len(missing)])).item():
        engine.update(trainer, module, max_model_tokens)
    size = max(1, PART // config.n)
    with sampling_bar(trainer, len(missing)) as on_progress:
        for first in range(0, len(missing), size):
            some = missing[first : first + size]
            store.add(some, engine.draw(some, config, on_progress).groups)
    groups = [store[prompt] for prompt in prompts]
    return Samples(groups, trainer.global_step, time.monotonic() - start)
