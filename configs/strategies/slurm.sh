#!/bin/bash
# One task for each GPU of each node; srun tells Lightning its place.
#   sbatch configs/strategies/slurm.sh --config configs/own.yaml --trainer.strategy fsdp2
#SBATCH --job-name=prl
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
# Before the limit of time: save, requeue, and continue from the last checkpoint.
#SBATCH --signal=SIGUSR1@180
#SBATCH --requeue
set -euo pipefail
exec srun --kill-on-bad-exit=1 python -m prl_lightning fit "$@" --ckpt_path last \
  --trainer.num_nodes "$SLURM_NNODES" --trainer.devices "$SLURM_NTASKS_PER_NODE"
