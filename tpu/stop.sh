#!/usr/bin/env bash
# Interrupts the run as Ctrl-C would: the program saves at the next safe point and exits with 130, which tpu/resume.sh
# takes as a person's wish and does not undo. The slice stays, and is billed, until tpu/delete.sh.
#
#     tpu/stop.sh --name=demo --zone=us-east5-b --project=mine --accelerator=v6e-8

set -euo pipefail
# shellcheck source=tpu/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

declare -A own=()
parse_flags "$@"
for node in "${nodes[@]}"; do
  remote_worker "$node" all stop
done
