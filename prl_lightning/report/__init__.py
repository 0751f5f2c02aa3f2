"""A training run as one HTML page: curves, evaluations and who got which credit, token by token."""

from prl_lightning.report.page import write_report

__all__ = ["write_report"]
