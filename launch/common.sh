# shellcheck shell=bash
# Sourced by the launchers: options and dry runs. A mistake is one message and exit status 2.
set -euo pipefail

run=() # what stands after --: stepwiser's stage and options
# shellcheck disable=SC2034 # read by the launchers
name='' type='' slices=1 dry_run=''

fail() {
  printf 'error: %s\n' "$1" >&2
  exit 2
}

usage() { # prints the comment at the top of the launcher
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
}

# parse "VALUES" "FLAGS" "$@": --some-name X sets some_name=X if VALUES has some_name, --some-flag
# sets some_flag=yes if FLAGS has it, and what follows -- becomes the array run.
parse() {
  local values=" $1 " flags=" $2 dry_run " word key
  shift 2
  [[ ! "$*" =~ hf_[A-Za-z0-9]{20} ]] ||
    fail "a Hugging Face token stands in the arguments, where logs keep it; --help says how to pass one"
  while (($#)); do
    word=$1
    shift
    key=${word#--}
    key=${key//-/_}
    case $word in
      -h | --help) usage && exit 0 ;;
      --) run=("$@") && break ;;
      --*) ;;
      *) fail "expected an option, found '$word'; the stage and its options stand after --" ;;
    esac
    if [[ $flags == *" $key "* ]]; then
      printf -v "$key" yes
    elif [[ $values == *" $key "* ]]; then
      [[ $# -gt 0 && $1 != --* ]] || fail "$word needs a value"
      printf -v "$key" %s "$1"
      shift
    else
      fail "unknown option $word; --help lists them"
    fi
  done
  local words=" ${run[*]-} "
  [[ $words == *" --config "* && $words == *" --run-dir "* ]] ||
    fail "expected -- STAGE --config FILE --run-dir DIR at the end, found '${run[*]-}'"
  [[ ! $words =~ ' '--(distributed|coordinator|num-processes|process-id)' ' ]] ||
    fail "--${BASH_REMATCH[1]} is the launcher's to add; leave it out after --"
  [[ ! $dry_run ]] ||
    printf '# to check the run itself, where its files are: %s\n' \
      "$(quote stepwiser "${run[@]}" --dry-run)" >&2
}

need() { # need OPTION...: fails unless each has a value
  local option
  for option; do
    [[ ${!option} ]] || fail "--${option//_/-} is missing; --help lists the options"
  done
}

need_counts() { # need_counts OPTION...: fails unless each is a whole number from 1
  local option
  for option; do
    [[ ${!option} =~ ^[1-9][0-9]*$ ]] ||
      fail "--${option//_/-}: expected a whole number from 1, found '${!option}'"
  done
}

need_names() { # need_names OPTION...: fails unless each is a name as Google Cloud and Kubernetes take it
  local option
  for option; do
    [[ ${!option} =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
      fail "--${option//_/-}: expected up to 40 of a-z, 0-9 and -, a letter first, found '${!option}'"
  done
}

need_sharded() { # fails unless the stage can be divided into shards
  local stages="rollout chunk-solutions annotate rejection-sample evaluate search select-responses refine"
  [[ " $stages " == *" ${run[0]} "* ]] ||
    fail "--shards: expected a stage of $stages, found '${run[0]}'"
}

need_type() { # need_type GENERATION...: fails unless --type is an accelerator type of one of them
  [[ " $* " == *" ${type%-*} "* && ${type##*-} =~ ^[1-9][0-9]*$ ]] ||
    fail "--type: expected one of $* and a size, as in $1-8, found '$type'"
}

several_hosts() { # a type up to a size of 8 is one host, whether the size counts chips or cores
  ((${type##*-} > 8 || slices > 1))
}

quote() { # prints the words as a shell would read them back
  local line
  printf -v line '%q ' "$@"
  printf '%s\n' "${line% }"
}

send() { # run the command, or only print it in a dry run
  if [[ $dry_run ]]; then quote "$@"; else "$@"; fi
}

run_dir() { # prints the value of --run-dir in the run
  local i
  for ((i = 0; i < ${#run[@]}; i++)); do
    [[ ${run[i]} != --run-dir ]] || printf '%s\n' "${run[i + 1]-}"
  done
}
