#!/usr/bin/env bash
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# What launch/slurm.sh submits: slurm_job.sh SHARDS MAX_RESTARTS PORT STAGE --config FILE ...
# One process on each node holds all its GPUs. SHARDS is 0 unless it is an array.
set -euo pipefail
shards=$1 max_restarts=$2 port=$3
shift 3

command=(stepwiser "$@")
((shards == 0)) || command+=(--shard "$SLURM_ARRAY_TASK_ID/$shards")
if ((SLURM_JOB_NUM_NODES > 1)); then
  read -r first < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  command+=(--coordinator "$first:$port" --num-processes "$SLURM_JOB_NUM_NODES")
  # If it sees SLURM, jax gives each process one GPU unless it is told otherwise.
  JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((SLURM_GPUS_ON_NODE - 1)))
  export JAX_LOCAL_DEVICE_IDS
  # shellcheck disable=SC2016 # each task has its own number
  command=(bash -c 'exec "$@" --process-id "$SLURM_PROCID"' task "${command[@]}")
fi

# SLURM sends TERM --grace seconds before the end, and when it preempts. It goes to the processes by
# scancel: srun itself would answer it by killing them.
srun --cpu-bind=none "${command[@]}" &
step=$!
warned='' status=0
trap 'warned=yes; scancel --signal=TERM "$SLURM_JOB_ID"' TERM
wait "$step" || status=$?
if [[ $warned ]]; then
  status=0
  wait "$step" || status=$? # the signal ended the first wait, the run saves meanwhile
fi
if [[ $warned && $status != 0 ]] && ((${SLURM_RESTART_COUNT:-0} < max_restarts)); then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
