"""What happens around the steps: sampling before them, a summary after them."""

from prl_lightning.callbacks.rollout import RolloutCallback
from prl_lightning.callbacks.summary import RunSummary

__all__ = ["RolloutCallback", "RunSummary"]
