"""What happens around the steps: sampling, saving on a signal, a summary at the end."""

from prl_lightning.callbacks.export import HFExport
from prl_lightning.callbacks.preemption import SaveOnSignal
from prl_lightning.callbacks.rollout import RolloutCallback
from prl_lightning.callbacks.summary import RunSummary

__all__ = ["HFExport", "RolloutCallback", "RunSummary", "SaveOnSignal"]
