# shellcheck shell=bash
# Sourced by tpu_vm.sh and tpu_pod.sh: lets a run outlive the machines it runs on.
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# shellcheck disable=SC2034 # read by the two
zone='' project='' version='' setup='' spot='' keep='' max_attempts=10 poll=30
parse "name zone project type slices version setup max_attempts poll" "spot keep" "$@"
need name zone type version
need_names name
need_counts slices max_attempts
need_type v4 v5litepod v5p v6e
# shellcheck disable=SC2034
where=(--zone="$zone" --quiet ${project:+--project="$project"})

state_of() { # prints the answer of `gcloud ... describe`, ABSENT if there is no such thing
  local answer
  if answer=$("$@" --verbosity=error 2>&1); then
    echo "$answer"
  elif [[ $answer == *NOT_FOUND* ]]; then
    echo ABSENT
  else
    echo "$answer" >&2
    return 1
  fi
}

# until_finished: create the machines, start the run, create them again when they were preempted, at
# most max_attempts times, and delete them however it ends, unless there is --keep. The launcher says
# how, in state (ABSENT if there is none), create, start and delete. If a run fails and its machines
# stay, it is not started again: its exit status is this function's.
until_finished() {
  local attempt=0 status=0 now polls
  if [[ $dry_run ]]; then
    create && start
    [[ $keep ]] || delete
    return
  fi
  trap 'exit 130' INT TERM
  while now=$(state); do
    [[ $keep ]] || trap delete EXIT
    echo "$(date '+%F %T') $name: $now" >&2
    case $now in
      ABSENT)
        if ((attempt++ == max_attempts)); then
          trap - EXIT
          echo "error: $name was lost $max_attempts times; the same command goes on" >&2
          return 1
        fi
        create
        ;;
      ACTIVE | READY)
        status=0
        start || status=$?
        ((status)) || return 0
        # The connection breaks before the state says why.
        for ((polls = 0; polls < 10; polls++)); do
          sleep "$poll"
          now=$(state)
          [[ $now == ACTIVE || $now == READY ]] || continue 2
        done
        return "$status"
        ;;
      FAILED | SUSPENDED | PREEMPTED | TERMINATED | STOPPED) delete ;;
      *) sleep "$poll" ;;
    esac
  done
  return 1
}
