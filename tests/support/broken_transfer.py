"""A transfer that fails after the first weight."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor

from prl_lightning.sampling import WeightTransfer
from prl_lightning.sampling.server_client import ServerClient
from prl_lightning.sampling.server_facts import ServerFacts


class BrokenTransfer(WeightTransfer):
    def complaints(self, facts: ServerFacts) -> Iterator[str]:
        yield from ()

    def send(self, client: ServerClient, weights: Iterable[tuple[str, Tensor]]) -> None:
        next(iter(weights))
        raise OSError("no_room_left")
