"""Rewards of this project. docs/rewards.md of prl_lightning describes arguments and results."""

from typing import Any

from prl_lightning.rewards import completion_text


def short_enough(completions: list[Any], **columns: Any) -> list[float]:
    """Return 1 for each completion of less than 2000 characters, else 0.

    Args:
        completions: of one prompt or of several.
        columns: of the dataset by name, such as ``answer``, one value for each completion.
    """
    return [float(len(completion_text(completion)) < 2000) for completion in completions]
