"""What happens around the steps: sampling, saving on a signal, what is written down."""

from prl_lightning.callbacks.completion_log import CompletionLog
from prl_lightning.callbacks.evaluation_log import EvaluationLog
from prl_lightning.callbacks.guard import UpdateGuard
from prl_lightning.callbacks.hf_export import HFExport
from prl_lightning.callbacks.last_checkpoint import LastCheckpoint
from prl_lightning.callbacks.preemption import SaveOnSignal
from prl_lightning.callbacks.rollout import RolloutCallback
from prl_lightning.callbacks.summary import RunSummary

__all__ = [
    "CompletionLog",
    "EvaluationLog",
    "HFExport",
    "LastCheckpoint",
    "RolloutCallback",
    "RunSummary",
    "SaveOnSignal",
    "UpdateGuard",
]
