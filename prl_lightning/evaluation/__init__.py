"""Evaluation: its settings, metrics and results."""

from prl_lightning.evaluation.settings import Evaluation

__all__ = ["Evaluation"]
