"""The gap between the log-probabilities of an engine and of the trainer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prl_lightning.data import collate
from prl_lightning.models.causal_lm import LogprobModel
from prl_lightning.types import Completion, Prompt, Rollout


@torch.no_grad()
def trainer_gap(
    policy: LogprobModel,
    prompts: Sequence[Prompt],
    groups: Sequence[list[Completion]],
    temperature: float = 1.0,
) -> Tensor:
    """Absolute differences between the engine's log-probabilities and the trainer's."""
    rollouts = [
        Rollout(prompt, completion, text="", temperature=temperature)
        for prompt, group in zip(prompts, groups, strict=True)
        for completion in group
    ]
    device = next(policy.parameters()).device
    batch = collate(rollouts, update_tokens=1, update_sequences=1).to(device)
    logprobs, _ = policy(batch)
    return (logprobs - batch.rollout_logprobs).abs()[batch.completion_mask]
