"""HFExport: the trained policy as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from prl_lightning.models.export import save_policy, torch_dtype
from prl_lightning.runs.files import refuse_existing
from prl_lightning.trainer_access import prl_module, run_folder


class HFExport(Callback):
    """Write the policy at the end of training, for ``from_pretrained`` and for engines.

    Under a strategy that shards, rank 0 gathers the weights one by one. A ``fast_dev_run`` writes
    nothing.

    Args:
        folder: by default ``huggingface`` in the run's folder.
        dtype: of the weights in it, such as bfloat16; by default as they were trained.
    """

    def __init__(self, folder: str | None = None, dtype: str | None = None) -> None:
        self.folder = folder
        self.dtype = dtype

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the arguments now instead of at the end of the run.

        Raises:
            FileExistsError: ``folder`` exists.
            ValueError: ``dtype`` is not a floating-point type of torch.
        """
        if stage == "fit" and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            torch_dtype(self.dtype)
            refuse_existing(self._target(trainer), "HFExport.folder")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the folder, after callbacks that replace the weights by their average."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        module = prl_module(pl_module)
        folder = self._target(trainer)
        keep = trainer.is_global_zero
        weights = {name: tensor.cpu() for name, tensor in module.weights() if keep}
        if keep:
            save_policy(weights, module.policy_name, folder, self.dtype)
        rank_zero_info(f"The policy is in {folder}")

    def _target(self, trainer: Trainer) -> Path:
        return Path(self.folder) if self.folder else run_folder(trainer) / "huggingface"
