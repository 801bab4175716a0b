#!/usr/bin/env bash
# Asks for a TPU slice as a queued resource and waits until it is ACTIVE.
#
#     tpu/create.sh --name=demo --zone=us-east5-b --project=mine --accelerator=v6e-8 --spot
#
# Exit code 1: not ACTIVE within --timeout (the request stays in the queue and is billed once it is granted), or the
# request failed. 2: bad flags.
#
#   --timeout=SECONDS    default 3600
#   --poll=SECONDS       between two looks at the state, default 30
#   --wait-only          ask for nothing, wait for the request that is already in the queue

set -euo pipefail
# shellcheck source=tpu/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

declare -A own=([timeout]=3600 [poll]=30 [wait-only]=no)
parse_flags "$@"
require_number timeout "${own[timeout]}"
require_number poll "${own[poll]}"
require_one_host

if [[ ${own[wait-only]} == no ]]; then
  request=("$name" "${location[@]}" --accelerator-type="$accelerator" --runtime-version="$runtime")
  if ((slices == 1)); then
    request+=(--node-id="$name")
  else
    request+=(--node-count="$slices" --node-prefix="$name")
  fi
  [[ $spot == no ]] || request+=(--spot)
  # --async: the time-out below is ours, whatever gcloud waits for.
  execute gcloud compute tpus queued-resources create "${request[@]}" --async --quiet "${create_flags[@]}"
fi
if [[ $dry_run == yes ]]; then
  show_describe
  exit 0
fi

deadline=$((SECONDS + own[timeout]))
last=''
while true; do
  # A look that fails (network, a restarting API) is repeated until the time is up.
  state=$(queue_state) || state=UNREACHABLE
  [[ $state == "$last" ]] || say "$name: $state"
  last=$state
  case $state in
    ACTIVE) exit 0 ;;
    FAILED | SUSPENDING | SUSPENDED)
      say "error: $name is $state (queued-resources describe says why); free it with tpu/delete.sh"
      exit 1
      ;;
    MISSING)
      # Right after an asynchronous create the request may not be visible yet; without one there is nothing to wait for.
      [[ ${own[wait-only]} == no ]] || die "--name=$name: there is no such request; drop --wait-only to make it"
      ;;
  esac
  if ((SECONDS + own[poll] > deadline)); then
    say "error: $name is $state after --timeout=${own[timeout]}; it stays queued: --wait-only, or tpu/delete.sh"
    exit 1
  fi
  sleep "${own[poll]}"
done
