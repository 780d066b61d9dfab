#!/usr/bin/env bash
# Runs on GKE by xpk: one run on one or several TPU slices of a cluster that xpk made. It is restarted
# after preemption.
#
#   launch/xpk.sh --name judge-7b --cluster tpus --zone us-east5-a --type v5p-128 \
#       --image REPOSITORY/stepwiser --storage runs \
#       -- train-judge --config configs/qwen2.5-7b_judge.yaml --run-dir /runs/judge \
#       --set examples.source=/runs/labels
#
#   --name NAME         of the workload
#   --cluster NAME      --zone ZONE, --project PROJECT if it is not gcloud's own
#   --type TYPE         accelerator type of a slice
#   --slices N          slices that make one run (1)
#   --image IMAGE       holds stepwiser and the config; not its secrets
#   --storage NAME      xpk storage with the run directory
#   --max-restarts N    (20)
#   --grace SECONDS     between Kubernetes' notice and the end of a pod (300): what a run needs to end a
#                       burst of sampling, or an iteration's updates, and to save. Spot machines
#                       may be gone sooner
#   --dry-run           print what would be sent, send nothing
#
# xpk writes environment variables into what it submits, so gated models are read from the storage, or
# by launch/jobset.sh, which takes its token from a Secret.

# shellcheck source-path=SCRIPTDIR
source "$(dirname "$0")/common.sh"

cluster='' zone='' project='' image='' storage='' max_restarts=20 grace=300
parse "name cluster zone project type slices image storage max_restarts grace" "" "$@"
need name cluster zone type image storage
need_names name cluster
need_counts slices max_restarts grace
need_type v4 v5litepod v5p v6e tpu7x
! several_hosts || run+=(--distributed)

# xpk restarts after signals (128 and above) by itself; 1 is a host that lost another one.
send xpk workload create --workload="$name" --cluster="$cluster" --zone="$zone" \
  ${project:+--project="$project"} --tpu-type="$type" --num-slices="$slices" \
  --docker-image="$image" --storage="$storage" --max-restarts="$max_restarts" \
  --restart-on-exit-codes=1 --termination-grace-period-seconds="$grace" \
  --command="$(quote stepwiser "${run[@]}")"
