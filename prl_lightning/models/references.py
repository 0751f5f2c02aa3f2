"""References: the frozen distributions that the policy is compared with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from prl_lightning.models.loading import load_config, load_reference
from prl_lightning.models.lora import adapters_off
from prl_lightning.models.sharding import Sharding, load_on_ranks
from prl_lightning.models.vocabulary import check_vocabulary
from prl_lightning.references import Reference
from prl_lightning.types import RolloutBatch

MOVING, UNIFORM = "moving", "uniform"
STARTING = "starting"  # the policy with its adapter off


class References(nn.Module):
    """Load references once each, and compute their log-probabilities.

    Args:
        settings: by name; their order is that of the columns that are computed.
        policy: Hugging Face id or folder of the policy.
        lora: whether the policy has an adapter. Without it the policy is its own starting model.

    Raises:
        ValueError: a moving reference of a policy with an adapter.
    """

    def __init__(self, settings: Mapping[str, Reference], policy: str, lora: bool) -> None:
        super().__init__()
        self.settings = settings
        self.policy_name = policy
        self.lora = lora
        self.models = nn.ModuleDict()  # by the keys of ``sources``
        self._vocabulary = 0
        moving = [name for name, one in settings.items() if one.kind == MOVING]
        if lora and moving:
            raise ValueError(
                f"model.objective.references.{moving[0]}.kind='moving' with model.lora: an adapter "
                "cannot be copied into a frozen model. Train all weights, or use kind='model'."
            )

    def __len__(self) -> int:
        """Return the number of references."""
        return len(self.settings)

    def sources(self) -> dict[str, str]:
        """Return the models to load, by a key; references with the same weights share one."""
        found = {self._key(one): one.model or self.policy_name for one in self.settings.values()}
        return {key: source for key, source in found.items() if key not in (UNIFORM, STARTING)}

    def load(self, sharding: Sharding | None, compile: bool) -> None:
        """Load the models; a collective.

        Args:
            sharding: of the strategy.
            compile: see LogprobModel.

        Raises:
            ValueError: a model has another vocabulary than the policy; before weights are read.
        """
        self._vocabulary = load_config(self.policy_name).get_text_config().vocab_size
        for source in self.sources().values():
            check_vocabulary(self.policy_name, source)
        for key, source in self.sources().items():
            load = partial(load_reference, source, compile)
            self.models[key] = load_on_ranks(load, sharding, keep_root=False)

    def score(self, batch: RolloutBatch, policy: nn.Module) -> Tensor:
        """Compute log-probabilities of the sampled tokens, without gradient.

        Args:
            batch: on the models' device.
            policy: with an adapter that is turned off for the starting policy.

        Returns:
            (B, T, K), K references.
        """
        keys = [self._key(one) for one in self.settings.values()]
        columns = {key: self._score(key, batch, policy) for key in dict.fromkeys(keys)}
        return torch.stack([columns[key] for key in keys], dim=-1)

    @torch.no_grad()
    def follow(self, policy: nn.Module, iterations: int) -> None:
        """Make moving references that are due the current policy.

        Args:
            policy: sharded as the references are.
            iterations: finished so far.
        """
        for one in self.settings.values():
            if one.kind == MOVING and iterations % one.every == 0:
                copies = self.models[self._key(one)].parameters()
                for copy, current in zip(copies, policy.parameters(), strict=True):
                    copy.copy_(current)

    def _score(self, key: str, batch: RolloutBatch, policy: nn.Module) -> Tensor:
        if key == UNIFORM:
            shape = batch.completion_ids.shape
            return torch.full(shape, -math.log(self._vocabulary), device=batch.rewards.device)
        scorer = policy if key == STARTING else self.models[key]
        with adapters_off(policy) if key == STARTING else nullcontext():
            logprobs: Tensor = scorer(batch)[0]
        return logprobs

    def _key(self, one: Reference) -> str:
        """Return what references with the same log-probabilities share."""
        if one.kind == UNIFORM:
            return UNIFORM
        if one.kind == MOVING:
            return f"{MOVING}_{one.every}"
        source = one.model or self.policy_name
        if self.lora and source == self.policy_name:
            return STARTING
        names = [other.model or self.policy_name for other in self.settings.values()]
        return f"model_{names.index(source)}"
