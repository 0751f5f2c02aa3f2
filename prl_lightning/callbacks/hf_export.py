"""HFExport: the trained policy as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from prl_lightning.models.export import refuse_existing, save_policy, torch_dtype
from prl_lightning.trainer_access import prl_module, run_folder


class HFExport(Callback):
    """Write the policy at the end of training, for ``from_pretrained`` and for engines.

    Under a strategy that shards, weights are gathered one by one and kept by the first rank.

    Args:
        folder: by default ``huggingface`` in the run's folder.
        dtype: of the weights in it, such as bfloat16; by default as they were trained.
    """

    def __init__(self, folder: str | None = None, dtype: str | None = None) -> None:
        self.folder = folder
        self.dtype = dtype

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse at once what would fail at the end.

        Raises:
            FileExistsError: there is something at ``folder``.
            ValueError: there is no such ``dtype``.
        """
        if stage == "fit":
            torch_dtype(self.dtype)
            refuse_existing(self._target(trainer), "HFExport.folder")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the folder."""
        module = prl_module(pl_module)
        folder = self._target(trainer)
        keep = trainer.is_global_zero
        weights = {name: tensor.cpu() for name, tensor in module.weights() if keep}
        if keep:
            save_policy(weights, module.policy_name, folder, self.dtype)
        rank_zero_info(f"The policy is in {folder}")

    def _target(self, trainer: Trainer) -> Path:
        run = run_folder(trainer) or Path(trainer.default_root_dir)
        return Path(self.folder) if self.folder else run / "huggingface"
