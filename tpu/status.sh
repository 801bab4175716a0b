#!/usr/bin/env bash
# Prints the state of the queued resource and, when it is ACTIVE, one line a worker: running, exited CODE, lost (its VM
# restarted), never started, or not set up.
#
#     tpu/status.sh --name=demo --zone=us-east5-b --project=mine --accelerator=v6e-8

set -euo pipefail
# shellcheck source=tpu/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

declare -A own=()
parse_flags "$@"
if [[ $dry_run == yes ]]; then
  show_describe
else
  state=$(queue_state)
  printf '%s: %s\n' "$name" "$state"
  [[ $state == ACTIVE ]] || exit 0
fi
for node in "${nodes[@]}"; do
  # Asked in one shell line, because before setup there is no worker.sh to ask.
  worker=safegrpo_jax/tpu/worker.sh
  remote_shell "$node" all "if [ -x $worker ]; then $worker status; else echo 'run: absent'; fi"
done
