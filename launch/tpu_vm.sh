#!/usr/bin/env bash
# Runs on a single TPU VM (one host: v5litepod-8, v6e-8, v5p-8 and smaller), which is created,
# created again after preemption, and deleted at the end.
#
#   launch/tpu_vm.sh --name judge --zone us-east5-b --type v6e-8 --version v2-alpha-tpuv6e --spot \
#       --setup 'sudo mount 10.0.0.2:/runs /mnt && . /mnt/venv/bin/activate' \
#       -- train-judge --config /mnt/judge.yaml --run-dir /mnt/judge
#
#   --name NAME         of the TPU VM
#   --zone ZONE         --project PROJECT if it is not gcloud's own
#   --type TYPE         accelerator type
#   --version VERSION   software of the TPU VM: gcloud compute tpus tpu-vm versions list
#   --setup COMMAND     typed on the host before the run: mount storage, install, read secrets
#   --spot              cheaper, and may be preempted
#   --max-attempts N    creations in all (10)
#   --keep              do not delete the TPU VM at the end
#   --poll SECONDS      between two looks at its state (30)
#   --dry-run           print what would be sent, send nothing
#
# The time that a preempted TPU VM leaves its run cannot be set. The run goes on from its last
# checkpoint, and train-judge also from the rollouts that it had stored.
# The run directory must lie on storage that outlives the TPU VM. A Hugging Face token is read by the
# host: --setup 'export HF_TOKEN=$(gcloud secrets versions access latest --secret hf-token)'.

# shellcheck source-path=SCRIPTDIR
source "$(dirname "$0")/tpu.sh"
! several_hosts || fail "--type: $type x $slices has several hosts; launch/tpu_pod.sh runs on those"
tpu=(gcloud compute tpus tpu-vm)

create() {
  send "${tpu[@]}" create "$name" "${where[@]}" --accelerator-type="$type" --version="$version" \
    ${spot:+--spot}
}

state() {
  state_of "${tpu[@]}" describe "$name" "${where[@]}" --format='value(state)'
}

start() {
  send "${tpu[@]}" ssh "$name" "${where[@]}" \
    --command="${setup:+$setup && }$(quote stepwiser "${run[@]}")"
}

delete() {
  send "${tpu[@]}" delete "$name" "${where[@]}"
}

until_finished
