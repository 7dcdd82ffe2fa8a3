#!/bin/bash
# One retrofit on several nodes of a SLURM cluster, one process per node and all of its GPUs:
#   CONFIG=configs/h200x8_llama3_8b.py WORKDIR=/shared/runs/llama sbatch --nodes=2 scripts/slurm_retrofit.sh \
#       --config.init.hf_dir=/shared/models/llama --config.parallel.preset=fsdp16
# The job is sent SIGTERM five minutes before its time is up, saves, and goes back into the queue until it has a report.
#SBATCH --job-name=dsa-retrofit
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

: "${CONFIG:?recipe, such as configs/h200x8_llama3_8b.py}"
: "${WORKDIR:?run directory, on a file system that all nodes share}"
PYTHON=${PYTHON:-.venv/bin/python}

# A process that fails or is killed takes the others with it; this script then ends with its status and is not requeued.
srun --kill-on-bad-exit=1 "$PYTHON" -m experiments.retrofit --config="$CONFIG" --workdir="$WORKDIR" "$@"

if [[ ! -e "$WORKDIR/report.json" ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
