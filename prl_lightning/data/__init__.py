"""Prompts in, rollouts out."""

from prl_lightning.data.difficulty import Difficulty
from prl_lightning.data.format import DataError, PromptFormat
from prl_lightning.data.gym import Curriculum, ReasoningGym
from prl_lightning.data.gym_tasks import GymTask
from prl_lightning.data.loader import RolloutLoader
from prl_lightning.data.prompts import PromptDataModule
from prl_lightning.data.rollouts import RolloutBuffer, collate
from prl_lightning.data.sources import Source
from prl_lightning.types import PromptSource

__all__ = [
    "Curriculum",
    "DataError",
    "Difficulty",
    "GymTask",
    "PromptDataModule",
    "PromptFormat",
    "PromptSource",
    "ReasoningGym",
    "RolloutBuffer",
    "RolloutLoader",
    "Source",
    "collate",
]
