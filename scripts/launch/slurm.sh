#!/bin/bash
# Two machines of 8 GPUs under Slurm: one task a machine starts accelerate, which starts one process a GPU.
#
#   sbatch scripts/launch/slurm.sh configs/experiments/gpu-7b.yaml train.micro_batches=2 [key=value ...]
#
# 16 processes x 2 micro-batches share the 32 prompts of a step: train.prompts_per_step is a multiple of their product.
# Submit from the checkout, on a file system that all machines see; .venv holds requirements/gpu.lock. Submit the same
# command again to go on after a time limit: finished stages are skipped, the training goes on from its last checkpoint.
#
# Tried on: nothing yet; a test checks its syntax.
#SBATCH --job-name=traitdose
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
set -euo pipefail

export MAIN_HOST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit=1 bash -c '
  exec .venv/bin/accelerate launch --config_file configs/accelerate/multi-node.yaml \
    --num_machines "$SLURM_NNODES" --num_processes $((SLURM_NNODES * 8)) \
    --machine_rank "$SLURM_NODEID" --main_process_ip "$MAIN_HOST" \
    -m scripts.cli run "$@"' _ "$@"
