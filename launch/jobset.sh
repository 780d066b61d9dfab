#!/usr/bin/env bash
# Runs on GKE by the JobSet controller: one run on one or several TPU slices, or the shards of one data
# set on many one-host slices, and their merge. Both are restarted after preemption.
#
#   launch/jobset.sh --name judge-7b --topology v5p:4x4x4 --image REPOSITORY/stepwiser --claim runs \
#       -- train-judge --config configs/qwen2.5-7b_judge.yaml --run-dir /runs/judge \
#       --set examples.source=/runs/labels
#   launch/jobset.sh --name values --topology v6e:2x4 --image REPOSITORY/stepwiser --claim runs \
#       --shards 32 --at-once 8 -- annotate --config configs/qwen2.5-7b_values.yaml \
#       --run-dir /runs/values --set rollouts=/runs/rollouts
#
#   --name NAME         of the JobSet
#   --topology T        of one slice, as `stepwiser plan` takes it: v4, v5e, v5p, v6e or tpu7x, a
#                       colon, chips along each side
#   --slices N          slices that make one run (1)
#   --shards N          instead: shards, each a run of its own on a slice of one host
#   --at-once N         shards that run at a time (all)
#   --image IMAGE       holds stepwiser and the config; not its secrets
#   --claim NAME        PersistentVolumeClaim (ReadWriteMany), mounted as /runs
#   --namespace NAME    (default)
#   --max-restarts N    of the run, or of each shard (20)
#   --grace SECONDS     between Kubernetes' notice and the end of a pod (300): what a run needs to end a
#                       burst of sampling, or an iteration's updates, and to save. Spot machines
#                       may be gone sooner
#   --dry-run           print what would be sent, send nothing
#
# A Hugging Face token, if one is needed, is the key HF_TOKEN of the Secret hf-token:
# kubectl create secret generic hf-token --from-file=HF_TOKEN=FILE

# shellcheck source-path=SCRIPTDIR
source "$(dirname "$0")/common.sh"

topology='' shards='' at_once='' image='' claim='' namespace=default max_restarts=20 grace=300
parse "name topology slices shards at_once image claim namespace max_restarts grace" "" "$@"
need name topology image claim
need_names name claim namespace
need_counts slices max_restarts grace ${shards:+shards} ${at_once:+at_once}
[[ $topology =~ ^(v5e|v6e):[1-9][0-9]*x[1-9][0-9]*$ ||
  $topology =~ ^(v4|v5p|tpu7x):[1-9][0-9]*x[1-9][0-9]*x[1-9][0-9]*$ ]] ||
  fail "--topology: expected as v5e:8x8 (v6e) or v5p:4x4x4 (v4, tpu7x), found '$topology'"
generation=${BASH_REMATCH[1]} shape=${topology#*:}
chips=$((${shape//x/*}))
case $generation in
  v4) accelerator=tpu-v4-podslice ;;
  v5e) accelerator=tpu-v5-lite-podslice ;;
  *) accelerator=tpu-$generation-slice ;;
esac
[[ $generation != tpu7x ]] || accelerator=tpu7x
hosts=1 # up to 8 chips of v5e and v6e, up to 4 of the others, are one host
if [[ $generation != v[56]e && $chips -gt 4 ]] || ((chips > 8)); then
  ((chips % 4 == 0)) || fail "--topology: hosts have 4 chips, and $shape is no multiple of 4"
  hosts=$((chips / 4))
fi
directory=$(run_dir)
[[ $directory == /runs/* ]] ||
  fail "--run-dir: expected a directory in /runs, where the claim is, found '$directory'"

folder=$(dirname "$0")
values=(NAME="$name" ACCELERATOR="$accelerator" SHAPE="$shape" IMAGE="$image" CLAIM="$claim"
  CHIPS=$((chips / hosts)) MAX_RESTARTS="$max_restarts" GRACE="$grace")
if [[ $shards ]]; then
  need_sharded
  ((hosts == 1 && slices == 1)) ||
    fail "--shards: a shard has one host, and $topology x $slices has $((hosts * slices));\
 submit larger ones as runs of their own, each with --shard I/N after --"
  template=$folder/shards.yaml
  values+=(SHARDS="$shards" AT_ONCE="${at_once:-$shards}")
else
  [[ ! $at_once ]] || fail "--at-once is for --shards"
  template=$folder/jobset.yaml
  values+=(SLICES="$slices" HOSTS="$hosts")
  ((hosts * slices == 1)) || run+=(--distributed)
fi
manifest=$("${PYTHON:-python3}" "$folder/render.py" "$template" "${values[@]}" -- "${run[@]}")
send kubectl apply --namespace="$namespace" --filename=- <<<"$manifest"
[[ ! $dry_run ]] || printf '%s\n' "$manifest"
