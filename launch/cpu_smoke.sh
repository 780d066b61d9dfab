#!/usr/bin/env bash
# Runs the pipeline stage by stage, as a person types it: tiny model, embedded task, some minutes on a
# laptop CPU. It trains too little for a number worth quoting; it shows that every stage runs, and reads
# what the stages before it wrote.
#
#   launch/cpu_smoke.sh [RUN_DIR]        exit status 0 if all is well
set -euo pipefail
case ${1-} in
  -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "$0" && exit 0 ;;
  -*) printf 'error: expected a directory for the runs, found %s; --help says more\n' "$1" >&2 && exit 2 ;;
esac
cd "$(dirname "$0")/.."
stepwiser=${STEPWISER:-stepwiser}
runs=${1:-$(mktemp -d)}
stage() { # stage NAME RUN [--set k=v ...]: configs/smoke_RUN.yaml into $runs/RUN
  local name=$1 run=$2
  shift 2
  echo "== $run"
  "$stepwiser" "$name" --config "configs/smoke_$run.yaml" --run-dir "$runs/$run" "$@" >"$runs/$run.log"
}
mkdir -p "$runs"

# 1. A policy learns to solve problems in chunks.
stage sft policy

# 2. It samples solutions of new problems, 4 of each.
stage rollout rollouts

# 3. Monte Carlo rollouts before and after every chunk say whether the chunk helped.
stage annotate values

# 4. Values become labels, labels become balanced judge examples.
stage label labels

# 5. The judge learns the form of a judgment, then GRPO teaches it to reason.
stage sft cold_start
stage train-judge judge

# 6. It finds first errors in held-out solutions ...
stage rollout heldout
stage evaluate evaluate

# 7. ... steers generation, and chooses responses to learn from.
stage search search
stage select-responses select

# 8. The baseline: a classifier learns the same labels, and judges a solution in one pass.
stage train-classifier classifier
stage evaluate evaluate_classifier

# 9. The offline judge: the cold start's own judgments that agree with the labels.
stage rejection-sample rationales

# 10. ThinkPRM: chains about whole solutions are sampled, filtered by the labels and learned.
stage sft thinkprm_start
stage rejection-sample thinkprm_chains
stage sft thinkprm
stage evaluate thinkprm_evaluate

# 11. A checkpoint becomes a Hugging Face directory.
"$stepwiser" convert --checkpoint "$runs/judge" --output "$runs/judge_hf"

# Every stage left a manifest and a summary; a finished stage started again does nothing.
for run in policy rollouts values labels cold_start judge heldout evaluate search select classifier \
  evaluate_classifier rationales thinkprm_start thinkprm_chains thinkprm thinkprm_evaluate; do
  test -s "$runs/$run/manifest.json" && test -s "$runs/$run/summary.json"
done
test -s "$runs/judge_hf/model.safetensors"
before=$(cksum "$runs/values/manifest.json")
stage annotate values
test "$before" = "$(cksum "$runs/values/manifest.json")"

# A mistake is one message and exit status 2, and leaves nothing behind.
status=0
"$stepwiser" label --config configs/smoke_labels.yaml --run-dir "$runs/typo" --set ruel=abs_q \
  2>"$runs/typo.log" || status=$?
test "$status" = 2 && test ! -e "$runs/typo" && grep -q "did you mean 'rule'" "$runs/typo.log"
echo "all is well: $runs"
