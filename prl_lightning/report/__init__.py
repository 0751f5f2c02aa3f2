"""A training run as one HTML page: curves, evaluations, and the credit of each token."""

from prl_lightning.report.page import write_report

__all__ = ["write_report"]
