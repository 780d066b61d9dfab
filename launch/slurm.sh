#!/usr/bin/env bash
# Runs on CUDA by SLURM: one run on one or several nodes, or the shards of one data set as an array, and
# their merge. Before its time is over, and when it is preempted, a run saves and is queued again.
#
#   launch/slurm.sh --name judge --nodes 2 --gpus 8 --time 12:00:00 \
#       -- train-judge --config configs/qwen2.5-7b_judge.yaml --run-dir /shared/runs/judge \
#       --set examples.source=/shared/runs/labels
#   launch/slurm.sh --name values --gpus 8 --time 4:00:00 --shards 32 --at-once 8 \
#       -- annotate --config configs/qwen2.5-7b_values.yaml --run-dir /shared/runs/values \
#       --set rollouts=/shared/runs/rollouts
#
#   --name NAME         of the job
#   --nodes N           nodes that make one run (1)
#   --gpus N            GPUs of a node (8)
#   --time TIME         limit, as sbatch takes it
#   --shards N          shards, each a run of its own
#   --at-once N         shards that run at a time (all)
#   --port PORT         of the coordinator, on the first node (8476)
#   --max-restarts N    times a run is queued again (20)
#   --grace SECONDS     between SLURM's warning and the end of the time (300): what a run needs to end
#                       a burst of sampling, or an iteration's updates, and to save. When SLURM
#                       preempts a job, the partition's GraceTime holds instead
#   --dry-run           print what would be sent, send nothing
#
# Partition and account are sbatch's own variables SBATCH_PARTITION and SBATCH_ACCOUNT. The job sees
# this shell's environment: the Python in which stepwiser is installed, HF_TOKEN if one is needed.

# shellcheck source-path=SCRIPTDIR
source "$(dirname "$0")/common.sh"

nodes=1 gpus=8 time='' shards='' at_once='' port=8476 max_restarts=20 grace=300
parse "name nodes gpus time shards at_once port max_restarts grace" "" "$@"
need name time
need_names name
need_counts nodes gpus port max_restarts grace ${shards:+shards} ${at_once:+at_once}
((port < 65536)) || fail "--port: expected a number below 65536, found '$port'"
[[ $time =~ ^[0-9]+(-[0-9]+)?(:[0-9]+){0,2}$ ]] ||
  fail "--time: expected minutes, H:MM:SS or D-H:MM:SS, found '$time'"
if [[ $shards ]]; then need_sharded; elif [[ $at_once ]]; then fail "--at-once is for --shards"; fi
directory=$(run_dir)
[[ $directory == /* ]] || fail "--run-dir: expected a path from / on, found '$directory'"

submit=(sbatch --parsable --job-name="$name" --nodes="$nodes" --gpus-per-node="$gpus" --time="$time"
  --signal="B:TERM@$grace" ${shards:+--array="0-$((shards - 1))${at_once:+%$at_once}"}
  "$(dirname "$0")/slurm_job.sh" "${shards:-0}" "$max_restarts" "$port" "${run[@]}")
if [[ $dry_run ]]; then
  quote "${submit[@]}"
  job=JOB
else
  job=$("${submit[@]}")
  echo "$job"
fi
[[ ! $shards ]] ||
  send sbatch --parsable --job-name="$name-merge" --dependency="afterok:${job%%;*}" --time=30 \
    --wrap="$(quote stepwiser "${run[@]}")"
