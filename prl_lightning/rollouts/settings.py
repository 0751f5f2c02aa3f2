"""RolloutSettings: the settings of an iteration."""

from __future__ import annotations

from dataclasses import dataclass

from prl_lightning.rewards import RewardLimits, RewardSum
from prl_lightning.sampling import Sampler


@dataclass(frozen=True)
class RolloutSettings:
    """The ``rollout`` section of a configuration; RolloutCallback describes the attributes.

    Raises:
        ValueError: a value out of range, or overlap with a sampler that blocks the trainer.
    """

    rewards: RewardSum
    sampler: Sampler
    temperature: float
    max_new_tokens: int
    max_engine_gap: float | None
    overlap: bool
    limits: RewardLimits

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("max_new_tokens", "temperature"):
            if getattr(self, name) <= 0:
                raise ValueError(f"rollout.{name}={getattr(self, name)}: must be above 0.")
        if self.overlap and not self.sampler.is_concurrent:
            raise ValueError(
                f"rollout.overlap=true, but {type(self.sampler).__name__} samples in the trainer's "
                "process. Wrap it: rollout.sampler: {class_path: "
                "prl_lightning.sampling.SubprocessSampler, init_args: {sampler: ...}}."
            )
