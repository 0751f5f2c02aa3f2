"""``python -m prl_lightning``, for launchers such as torchrun and SLURM."""

from prl_lightning.cli import run_command

run_command()
