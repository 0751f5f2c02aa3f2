"""Lightning callbacks: sampling, checkpoints, files."""

from prl_lightning.callbacks.completion_log import CompletionLog
from prl_lightning.callbacks.evaluation_log import EvaluationLog
from prl_lightning.callbacks.hf_export import HFExport
from prl_lightning.callbacks.last_checkpoint import LastCheckpoint
from prl_lightning.callbacks.rollout import RolloutCallback
from prl_lightning.callbacks.run_summary import RunSummary
from prl_lightning.callbacks.save_on_signal import SaveOnSignal
from prl_lightning.callbacks.update_guard import UpdateGuard

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
