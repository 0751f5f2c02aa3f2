"""Prompts in, rollouts out."""

from prl_lightning.data.format import DataError, PromptFormat
from prl_lightning.data.loader import RolloutLoader
from prl_lightning.data.prompts import PromptDataModule
from prl_lightning.data.rollouts import RolloutBuffer, collate
from prl_lightning.data.sources import Source

__all__ = [
    "DataError",
    "PromptDataModule",
    "PromptFormat",
    "RolloutBuffer",
    "RolloutLoader",
    "Source",
    "collate",
]
