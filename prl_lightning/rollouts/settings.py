"""RolloutSettings: the settings of an iteration."""

from __future__ import annotations

from dataclasses import dataclass

from prl_lightning.rewards import RewardLimits, RewardSum
from prl_lightning.sampling import Sampler
from prl_lightning.sampling.base import MIN_TEMPERATURE


@dataclass(frozen=True)
class RolloutSettings:
    """The ``rollout`` section of a configuration; RolloutCallback describes the attributes.

    Raises:
        ValueError: a value out of range, or overlap with refill or with a sampler that blocks the
            trainer.
    """

    rewards: RewardSum
    sampler: Sampler
    temperature: float
    max_new_tokens: int
    max_engine_gap: float | None
    overlap: bool
    limits: RewardLimits
    stop: tuple[str | int, ...] = ()
    refill: int = 1
    max_staleness: int = 1

    @property
    def engine_sampler(self) -> Sampler:
        """The sampler that has the engine, also within a SubprocessSampler."""
        inner: Sampler = getattr(self.sampler, "sampler", self.sampler)
        return inner

    def __post_init__(self) -> None:
        """Check the ranges."""
        least_values = {
            "max_new_tokens": 1, "temperature": MIN_TEMPERATURE, "refill": 1, "max_staleness": 1,
        }  # fmt: skip
        for name, least in least_values.items():
            if not getattr(self, name) >= least:
                raise ValueError(f"rollout.{name}={getattr(self, name)}: must be at least {least}.")
        if "" in self.stop:
            raise ValueError(f"rollout.stop={list(self.stop)}: a text must not be empty.")
        self._check_overlap()

    def _check_overlap(self) -> None:
        if self.overlap and self.refill > 1:
            raise ValueError(
                f"rollout.overlap=true and rollout.refill={self.refill}: how many prompts an "
                "iteration needs is known only when it has been rewarded, so the next one cannot "
                "be sampled meanwhile. Leave one of them out."
            )
        if self.overlap and self.sampler.ranks_per_engine > 1:
            raise ValueError(
                "rollout.overlap=true, but rollout.sampler.tensor_parallel_size="
                f"{self.sampler.ranks_per_engine}: ranks that share an engine run it in their own "
                "processes. Leave one of them out."
            )
        if self.overlap and not self.sampler.is_concurrent:
            raise ValueError(
                f"rollout.overlap=true, but {type(self.sampler).__name__} samples in the trainer's "
                "process. Wrap it: rollout.sampler: {class_path: "
                "prl_lightning.sampling.SubprocessSampler, init_args: {sampler: ...}}."
            )
        if self.max_staleness > 1 and not self.overlap:
            raise ValueError(
                f"rollout.max_staleness={self.max_staleness} has no effect without overlap: every "
                "iteration is sampled with the newest weights. Set rollout.overlap=true, or leave "
                "it out."
            )
        if self.max_staleness > 1 and not self.sampler.loads_in_thread:
            raise ValueError(
                f"rollout.max_staleness={self.max_staleness}, but {type(self.sampler).__name__} "
                "takes no weights while the trainer trains (loads_in_thread=False). Use "
                "SubprocessSampler, or VLLMServerSampler with FolderTransfer, or max_staleness=1."
            )
