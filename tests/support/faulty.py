"""An engine that fails when it is told to; ranks that are started import it by this name."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from dataclasses import replace

from prl_lightning.sampling import HFSampler, Progress, SamplingConfig
from prl_lightning.types import Completion, Prompt


class FaultySampler(HFSampler):
    """As HFSampler until its third call.

    Args:
        fault: what happens then.
        rank: where; everywhere by default.
    """

    def __init__(self, fault: str, rank: int | None = None) -> None:
        super().__init__()
        self.fault = fault
        self.rank = rank
        self.calls = 0

    def generate(
        self, prompts: Sequence[Prompt], config: SamplingConfig, on_progress: Progress | None = None
    ) -> list[list[Completion]]:
        groups = super().generate(prompts, config, on_progress)
        self.calls += 1
        own = int(os.environ.get("LOCAL_RANK", "0"))
        if self.calls != 3 or self.rank not in (None, own):
            return groups
        first = groups[0][0]
        match self.fault:
            case "memory":
                raise MemoryError("16 GiB wanted")
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "no group":
                groups.pop()
            case "one short":
                groups[0].pop()
            case "empty":
                groups[0][0] = replace(first, token_ids=[], logprobs=[])
            case "truncated":
                groups[0][0] = Completion(first.token_ids[:1], first.logprobs[:1], finished=False)
            case "no log-probability":
                groups[0][0] = replace(first, logprobs=first.logprobs[:-1])
            case "mask too long":
                groups[0][0] = replace(first, is_sampled=[*first.is_sampled, True])
        return groups
