#!/usr/bin/env bash
# Watches a run and brings it back after pre-emption: deletes the dead resource, creates it again, sets it up, starts
# the same command, which goes on from its last checkpoint. Also starts a run from nothing. Ends when the run does.
#
#     tpu/resume.sh --name=demo --zone=us-east5-b --project=mine --accelerator=v6e-8 --spot \
#         --keep=gs://mine/runs/demo -- python -m safegrpo_jax.main --config=configs/base.py
#
# A run that exits with 0 is finished, with 143 was pre-empted, with 130 was interrupted by a person; any other code is
# a failure. Only a pre-empted run is started again; this script ends with the code of the others. Stopping this script
# stops nothing on the slice: the same command watches again. The slice is left standing when the run is over.
#
#   --keep=gs://FOLDER   as for tpu/run.sh; needed, because a deleted VM takes its disk along
#   --keep-every=SECONDS default 300
#   --max-tries=N        starts and re-creations before giving up with exit code 1, default 10
#   --poll=SECONDS       between two looks, default 60
#   --timeout=SECONDS    for one wait in the queue, default 86400
#   --max-silence=N      looks in a row without an answer before giving up with exit code 1, default 30

set -euo pipefail
# shellcheck source=tpu/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

declare -A own=([keep]='' [keep-every]=300 [max-tries]=10 [poll]=60 [timeout]=86400 [max-silence]=30 [takes_command]='')
parse_flags "$@"
((${#command[@]})) || die "--: the command is missing; end with -- python -m safegrpo_jax.main --config=FILE"
for flag in keep-every max-tries poll timeout max-silence; do require_number "$flag" "${own[$flag]}"; done
require_one_host
refuse_secrets
check_keep "${own[keep]}"
if [[ -z ${own[keep]} && ! ($multi_host == yes && " ${command[*]}" == *" --workdir=/"*) ]]; then
  die "--keep is missing: a pre-empted VM loses its disk; write --keep=gs://BUCKET/FOLDER"
fi
here=$(dirname "${BASH_SOURCE[0]}")
tries=0
silence=0
keep=()
[[ -z ${own[keep]} ]] || keep=(--keep="${own[keep]}" --keep-every="${own[keep-every]}")

count_try() {
  if ((tries >= own[max-tries])); then
    say "error: given up after --max-tries=${own[max-tries]}; the last reason: $1"
    exit 1
  fi
  tries=$((tries + 1))
  say "$name: $1; try $tries of ${own[max-tries]}"
}

count_silence() {
  silence=$((silence + 1))
  if ((silence >= own[max-silence])); then
    say "error: no answer from $1 in --max-silence=${own[max-silence]} looks; the run may go on: tpu/status.sh"
    [[ ! -f $scratch/status.txt ]] || tail -n 3 "$scratch/status.txt" >&2
    exit 1
  fi
}

start_run() { "$here/run.sh" "${pass_on[@]}" "${keep[@]}" -- "${command[@]}"; }

create() { "$here/create.sh" "${pass_on[@]}" --timeout="${own[timeout]}" --poll="${own[poll]}" "$@"; }

# A step that fails (pre-empted again while it ran, no capacity) leaves a state that the next look sees and counts.
set_up_and_start() { "$here/setup.sh" "${pass_on[@]}" && start_run; }

# What the workers say, as one word: running, preempted, absent, never, or the exit code. One running worker means
# running: the others end with it, or its own time-out does.
run_state() {
  local lines word answer=''
  lines=$("$here/status.sh" "${pass_on[@]}" 2>"$scratch/status.txt" | sed -n 's/^run: //p') || return 1
  [[ -n $lines ]] || return 1
  for word in running 'exited 143' lost absent never; do
    if grep -qx -e "$word" <<<"$lines"; then
      answer=$word
      break
    fi
  done
  case $answer in
    'exited 143' | lost) answer=preempted ;;
    '') answer=$(sed -n 's/^exited \([0-9]*\)$/\1/p' <<<"$lines" | sort -n | tail -n 1) ;;
  esac
  printf '%s\n' "$answer"
}

if [[ $dry_run == yes ]]; then
  # The commands of one recovery; which of them run depends on the state found.
  show_describe
  "$here/delete.sh" "${pass_on[@]}" --yes
  create
  "$here/setup.sh" "${pass_on[@]}"
  start_run
  "$here/status.sh" "${pass_on[@]}"
  exit 0
fi

while true; do
  if ! state=$(queue_state); then
    count_silence gcloud
    sleep "${own[poll]}"
    continue
  fi
  case $state in
    ACTIVE)
      # Not an error at once: for minutes around a pre-emption the state is old and the machine gone.
      run=$(run_state) || run=''
      case $run in
        '')
          count_silence "the workers of $name"
          ;;
        running)
          silence=0
          ;;
        0)
          say "$name: the run is finished; fetch it with tpu/fetch.sh, then end the billing with tpu/delete.sh"
          exit 0
          ;;
        130)
          say "$name: the run was interrupted by a person; not started again (tpu/run.sh does)"
          exit 130
          ;;
        preempted)
          silence=0
          # Give the state time to follow: starting on a machine that is going away would waste a try.
          sleep "${own[poll]}"
          if [[ $(queue_state || true) == ACTIVE ]]; then
            count_try "the run was ended and the slice is still there"
            start_run || true
          fi
          continue
          ;;
        absent | never)
          silence=0
          count_try "no run on the slice"
          set_up_and_start || true
          ;;
        *)
          say "error: $name: the run failed with exit code $run; not started again; see tpu/logs.sh"
          exit "$run"
          ;;
      esac
      ;;
    SUSPENDED | FAILED)
      silence=0
      count_try "the resource is $state"
      if "$here/delete.sh" "${pass_on[@]}" --yes && create && set_up_and_start; then continue; fi
      ;;
    MISSING)
      silence=0
      count_try "there is no such resource"
      if create && set_up_and_start; then continue; fi
      ;;
    ACCEPTED | WAITING_FOR_RESOURCES | PROVISIONING | CREATING)
      silence=0
      count_try "waiting in the queue"
      create --wait-only || true
      continue
      ;;
    *) count_silence "a resource that stays $state" ;; # SUSPENDING, DELETING: soon something else
  esac
  sleep "${own[poll]}"
done
