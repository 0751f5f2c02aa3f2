"""LastCheckpoint: keep one checkpoint to resume from up to date."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging

from prl_lightning.trainer_access import is_last_epoch


class LastCheckpoint(ModelCheckpoint):
    """Write ``last.ckpt`` every n epochs and at the end, replacing the previous one.

    ModelCheckpoint with ``save_last=True, save_top_k=0`` saves only at the end: Lightning 2.6
    writes the last checkpoint only together with one of the top k.

    Args:
        every_n_epochs: a killed run loses at most this many iterations.
        dirpath: folder of the checkpoint; ``checkpoints`` in the run's folder by default.

    Raises:
        ValueError: the number is below 1.
    """

    def __init__(self, every_n_epochs: int = 10, dirpath: str | None = None) -> None:
        if every_n_epochs < 1:
            raise ValueError(
                f"LastCheckpoint(every_n_epochs={every_n_epochs}): must be at least 1."
            )
        super().__init__(
            dirpath,
            save_last=True,
            save_top_k=0,
            every_n_epochs=every_n_epochs,
            save_on_train_epoch_end=True,
        )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save after the validation of the epoch.

        Also of the last one if the policy is then replaced by its average.
        """
        is_due = (trainer.current_epoch + 1) % self._every_n_epochs == 0
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        is_averaged = any(isinstance(callback, WeightAveraging) for callback in callbacks)
        if is_due or (is_averaged and (trainer.should_stop or is_last_epoch(trainer))):
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the updates since the last checkpoint."""
        self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        """Save and tell the loggers, which may upload it; not twice, and not in a fast_dev_run."""
        if self._should_skip_saving_checkpoint(trainer):
            return
        path = Path(self.dirpath or trainer.default_root_dir) / f"last{self.FILE_EXTENSION}"
        self.last_model_path = str(path)  # is part of the saved state
        self._save_checkpoint(trainer, self.last_model_path)
