"""Environments and tools: completions of several turns, in which a model acts and reads results."""

from prl_lightning.environments.formats import ChatTools, TextTools, ToolCall, ToolFormat
from prl_lightning.environments.settings import Environments

__all__ = ["ChatTools", "Environments", "TextTools", "ToolCall", "ToolFormat"]
