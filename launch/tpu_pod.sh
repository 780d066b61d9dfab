#!/usr/bin/env bash
# Runs on a TPU pod slice, or on several slices, by a queued resource: it waits for its turn, runs on
# every host, is queued again after preemption, and deleted at the end.
#
#   launch/tpu_pod.sh --name judge-7b --zone us-east5-a --type v5p-128 --version v2-alpha-tpuv5 \
#       --spot --setup 'sudo mount 10.0.0.2:/runs /mnt && . /mnt/venv/bin/activate' \
#       -- train-judge --config /mnt/judge.yaml --run-dir /mnt/judge
#
#   --name NAME         of the queued resource and, with its number after it, of each slice
#   --zone ZONE         --project PROJECT if it is not gcloud's own
#   --type TYPE         accelerator type of a slice
#   --slices N          slices that make one run (1); the platform tells hosts their slice
#   --version VERSION   software of the TPU VMs: gcloud compute tpus tpu-vm versions list
#   --setup COMMAND     typed on every host before the run: mount storage, install, read secrets
#   --spot              cheaper, and may be preempted
#   --max-attempts N    times in the queue in all (10)
#   --keep              do not delete the slices at the end
#   --poll SECONDS      between two looks at the queue (30)
#   --dry-run           print what would be sent, send nothing
#
# The time that a preempted TPU VM leaves its run cannot be set. The run goes on from its last
# checkpoint, and train-judge also from the rollouts that it had stored.
# gcloud reaches several hosts only with a key in the agent: ssh-add ~/.ssh/google_compute_engine.
# The run directory must lie on storage that all hosts share and that outlives them. A Hugging Face
# token is read by the hosts:
# --setup 'export HF_TOKEN=$(gcloud secrets versions access latest --secret hf-token)'.

# shellcheck source-path=SCRIPTDIR
source "$(dirname "$0")/tpu.sh"
queue=(gcloud compute tpus queued-resources)

create() {
  local nodes=(--node-id="$name")
  ((slices == 1)) || nodes=(--node-count="$slices" --node-prefix="$name")
  send "${queue[@]}" create "$name" "${where[@]}" "${nodes[@]}" --accelerator-type="$type" \
    --runtime-version="$version" ${spot:+--spot}
}

state() {
  state_of "${queue[@]}" describe "$name" "${where[@]}" --format='value(state.state)'
}

start() {
  ! several_hosts || run+=(--distributed)
  # 8476: the firewall rule that comes with a TPU opens it, and not jax's default of 8482.
  send "${queue[@]}" ssh "$name" "${where[@]}" --node=all --worker=all --batch-size=all \
    --command="${setup:+$setup && }JAX_COORDINATOR_PORT=8476 $(quote stepwiser "${run[@]}")"
}

delete() {
  send "${queue[@]}" delete "$name" "${where[@]}" --force
}

until_finished
